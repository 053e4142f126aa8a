"""The server's configuration: config.properties, command line and defaults made into one checked object.

Precedence: environment variables (``PYSERVE_JOB_QUEUE_SIZE``; then ``TS_JOB_QUEUE_SIZE``, but only with
``enable_envvars_config=true`` in the file), then command line, then file (``$TS_CONFIG_FILE``, else ``--ts-config``,
else ``./config.properties``), then default. Where each value came from is kept in ``Config.origin``, so that messages
can name the place, and what it overrides beside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from pyserve.config.address import Address
from pyserve.config.keys import (
    ACCEPTED_KEYS,
    FLAG_ONLY,
    KINDS,
    MODEL_SETTINGS,
    SNAPSHOT_KEYS,
    SWITCH_KEYS,
    ModelSettings,
    misspelt,
    settings_of,
)
from pyserve.config.model_source import ModelSource, list_store, resolve_models, store_problems
from pyserve.config.nearest import nearest, nearest_of_file
from pyserve.config.properties import PropertiesError, Property, parse_properties
from pyserve.errors import ConfigError, JsonObject

CONFIG_FILE_DEFAULT = "config.properties"
CONFIG_FILE_SIZE_MAX = 1 << 20
INFERENCE_ADDRESS_DEFAULT = Address("127.0.0.1", 8080)
MANAGEMENT_ADDRESS_DEFAULT = Address("127.0.0.1", 8081)
METRICS_ADDRESS_DEFAULT = Address("127.0.0.1", 8082)
ADDRESS_KEYS = ("inference_address", "management_address", "metrics_address")

_VARIABLE = re.compile(r"\$\$([^$]+)\$\$")


@dataclass
class Config:
    """All settings under their names in config.properties; sizes in bytes, times in seconds.

    Attributes:
        model_store: absolute path of the folder with archives; ``None`` if none is configured.
        models: defaults per model and version, keys as in the file (``minWorkers`` ...).
        default_workers_per_model: 0 means one on a CPU, one per GPU.
        default_backend: what runs models in the native lane that do not say; ``auto`` the fastest that gives the same
            answers. TorchScript, which needs no such comparison, until that has been in use for longer.
        queue_full_status: of a request that finds the queue of its model full: 503 or 429.
        queue_full_retry_after: s, in the header ``Retry-After`` of such an answer; 0 means 1 to 3, spread.
        response_compression: answers are compressed for clients that ask for it.
        response_compression_size_min: smaller answers are not.
        number_of_gpu: the most GPUs to use; ``None`` means all.
        allowed_urls: comma-joined patterns; empty means that no URL is fetched.
        enable_model_api: ``None`` means on exactly when management listens on loopback, and off in strict mode.
        model_control_on_inference: Triton's calls that load and unload are on the inference ports too, as guarded.
        console: whether browsers get a page at ``/``; ``None`` means yes, and no in strict mode.
        disable_token_authorization: ``None`` means that only management needs tokens, where it is not on loopback.
        token_file: keys that somebody else made; ``""`` to have them made.
        token_expiration_min: minutes.
        state_dir: where the folder with our own state is made; ``""`` for the user's runtime or state folder.
        enable_grpc: ``auto`` means wherever grpcio is installed.
        metrics_mode: ``""`` means ``prometheus``, and ``log`` under ``compat=strict``.
        model_snapshot: models to load instead of ``load_models``, as a snapshot names them; ``{}`` for none.
        restore: load what the newest snapshot in the log folder names.
        archive_unpacked_size_max: ``None`` means as much as the disk of the cache folder has room for.
        archive_entry_size_max: ``None`` means that one file has no limit of its own.
        download_size_max: ``None`` means as much as the disk of the model store has room for.
        allow_private_addresses: archives may be fetched from addresses that are not public.
        access_log, request_log: answers have lines in access_log.log; on the console, with the times of stages.
        server_timing: every answer tells its stages, not only those that are asked for them.
        preprocess_threads: 0 means as many as the CPU budget.
        cpu_budget: CPUs to use; 0 means what the cgroup allows.
        stuck_threads_max: with more threads that do not end the process is replaced; 0: half of the CPUs, or one.
        device_losses_max: how often in a row a device may be lost before its models are left out for a while.
        isolate_errors: a batch of a handler that fails, or that ends its worker, is called again item by item.
        debug: one worker for each model, and as much time as there is.
        ts_open_inference_protocol: the Open Inference Protocol's server endpoints are there, as TorchServe has them.
        front_ends: processes that accept connections; with more than one, in front of another that holds the models.
        watch: handler code is loaded anew when it changes.
        strict: a model that fails to load at start ends the server.
        self_signed_dir: no key of the file: the supervisor puts the certificate there that it makes if none is given.
        origin: key to place, such as ``"config.properties:12"``, ``"--model-store"`` or ``"default"``.
        overridden: key to [place, text] of each setting that ``origin`` goes before, the strongest first.
        unknown_keys: ``config.properties:7: unknown key 'bach_size'; ...`` for each; an error under ``strict``.
        repeated_keys: the same of keys that stand twice in the file; the last one counts.
        warnings: what is probably a mistake, one line each.
        notices: what is harmless but worth knowing, one line each.
    """

    inference_address: Address = INFERENCE_ADDRESS_DEFAULT
    management_address: Address = MANAGEMENT_ADDRESS_DEFAULT
    metrics_address: Address = METRICS_ADDRESS_DEFAULT
    model_store: str | None = None
    load_models: str = ""
    models: ModelSettings = field(default_factory=dict)
    default_workers_per_model: int = 0
    default_response_timeout: int = 120
    default_startup_timeout: int = 120
    default_backend: str = "torchscript"
    unregister_model_timeout: int = 120
    job_queue_size: int = 100
    queue_full_status: int = 503
    queue_full_retry_after: int = 0
    max_request_size: int = 6_553_500
    max_response_size: int = 6_553_500
    response_compression: bool = True
    response_compression_size_min: int = 4096
    number_of_gpu: int | None = None
    limit_max_image_pixels: bool = True
    max_image_pixels: int = 89_478_485
    max_image_memory: int = 1 << 30
    decode_input_request: bool = True
    default_service_handler: str = ""
    allowed_urls: str = ""
    enable_model_api: bool | None = None
    model_control_on_inference: bool = False
    disable_token_authorization: bool | None = None
    token_file: str = ""
    state_dir: str = ""
    enable_metrics_api: bool = True
    console: bool | None = None
    cors_allowed_origin: str = ""
    cors_allowed_methods: str = ""
    cors_allowed_headers: str = ""
    service_envelope: str = ""
    install_py_dep_per_model: bool = False
    blacklist_env_vars: str = ""
    metrics_config: str = ""
    ts_header_key_sequence_id: str = "ts_request_sequence_id"
    ts_header_key_sequence_start: str = "ts_request_sequence_start"
    ts_header_key_sequence_end: str = "ts_request_sequence_end"
    token_expiration_min: float = 60.0
    private_key_file: str = ""
    certificate_file: str = ""
    keystore: str = ""
    keystore_pass: str = field(default="changeit", repr=False)
    keystore_type: str = "PKCS12"
    enable_grpc: str = "auto"
    enable_grpc_ssl: bool = False
    grpc_inference_address: str = "127.0.0.1"
    grpc_inference_port: int = 7070
    grpc_inference_max_connection_age_ms: int | None = None
    grpc_inference_max_connection_age_grace_ms: int | None = None
    grpc_management_address: str = "127.0.0.1"
    grpc_management_port: int = 7071
    grpc_management_max_connection_age_ms: int | None = None
    grpc_management_max_connection_age_grace_ms: int | None = None
    metrics_mode: str = ""
    model_metrics_auto_detect: bool = False
    disable_system_metrics: bool = False
    metric_time_interval: int = 60
    system_metrics_cmd: str = ""
    model_snapshot: JsonObject = field(default_factory=dict)
    restore: bool = False
    no_config_snapshots: bool = False
    archive_unpacked_size_max: int | None = None
    archive_entry_size_max: int | None = None
    archive_entry_count_max: int = 100_000
    archive_ratio_max: int = 200
    archive_ratio_free_size: int = 4 << 30
    download_size_max: int | None = None
    download_timeout_s: int = 14_400
    allow_private_addresses: bool = False
    log_format: str = "text"
    log_level: str = "info"
    server_timing: bool = False
    access_log: bool = True
    request_log: bool = False
    debug: bool = False
    ipex_enable: bool = False
    ipex_gpu_enable: bool = False
    ts_open_inference_protocol: bool = False
    initial_worker_port: int = 9000
    isolate_errors: bool = True
    watch: bool = False
    preprocess_threads: int = 0
    drain_delay_s: int = 1
    drain_timeout_s: int = 30
    error_detail: str = "auto"
    compat: str = "default"
    strict: bool = False
    cpu_budget: int = 0
    stuck_threads_max: int = 0
    device_losses_max: int = 2
    connection_count_max: int = 10_000
    front_ends: int = 1
    self_signed_dir: str = ""
    origin: dict[str, str] = field(default_factory=dict)
    overridden: dict[str, list[list[str]]] = field(default_factory=dict)
    unknown_keys: list[str] = field(default_factory=list)
    repeated_keys: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def addresses(self) -> dict[str, Address]:
        """``inference``, ``management`` and, unless switched off, ``metrics``."""
        addresses = {"inference": self.inference_address, "management": self.management_address}
        if self.enable_metrics_api:
            addresses["metrics"] = self.metrics_address
        return addresses

    @property
    def management_is_local(self) -> bool:
        """Whether only this machine can reach the management APIs, and what else loads and unloads models."""
        addresses = [self.management_address]
        grpc = [self.grpc_management_address]
        if self.model_control_on_inference:
            addresses.append(self.inference_address)
            grpc.append(self.grpc_inference_address)
        if self.enable_grpc != "false":
            addresses += map(Address, grpc)
        return all(address.is_loopback for address in addresses)

    @property
    def allows_model_api(self) -> bool:
        """Whether models may be registered and unregistered."""
        if self.enable_model_api is not None:
            return self.enable_model_api
        return self.management_is_local and self.compat != "strict"

    @property
    def has_console(self) -> bool:
        """Whether browsers get a page at ``/`` of the inference and the management port."""
        return self.compat != "strict" if self.console is None else self.console

    def metrics_file(self) -> str | None:
        """The absolute path of ``metrics_config``, for processes that have another current folder."""
        return str(Path(self.metrics_config).absolute()) if self.metrics_config else None

    def models_to_load(self) -> list[ModelSource]:
        """What ``load_models`` asks for, in order, each once."""
        return resolve_models(self.load_models, self.model_store)

    def store_files(self) -> list[str]:
        """Names of all archives and model folders in the model store, sorted."""
        return list_store(self.model_store)

    def to_json(self) -> JsonObject:
        """A JSON object from which ``from_json`` makes an equal configuration."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: str(value) if isinstance(value, Address) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: JsonObject) -> Config:
        """The inverse of ``to_json``, which may have been another version's: what is not known here is left out."""
        # Every address that to_json wrote names its port, so that no default is ever taken here.
        addresses = {key: Address.parse(values[key], 0) for key in ADDRESS_KEYS}
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in {**values, **addresses}.items() if name in known})


class _Setting(NamedTuple):
    text: str
    place: str


class UnknownKeyError(ConfigError):
    """A key of the file is not known, or stands there twice, and ``strict`` is on.

    Attributes:
        exit_code: of the command.
    """

    exit_code = 2


class MissingStoreError(ConfigError):
    """There is no model store, and what is to be loaded lies in none."""


def load_config(
    overrides: Mapping[str, tuple[str, str]] | None = None,
    *,
    ts_config: str | None = None,
    environ: Mapping[str, str] | None = None,
    warnings: list[str] | None = None,
) -> Config:
    """`read_config`, `check_keys` and `check_config`.

    Raises:
        ConfigError: names the place, the key, the value and what is allowed.
    """
    config = read_config(overrides, ts_config=ts_config, environ=environ, warnings=warnings)
    check_keys(config)
    check_config(config)
    return config


def read_config(
    overrides: Mapping[str, tuple[str, str]] | None = None,
    *,
    ts_config: str | None = None,
    environ: Mapping[str, str] | None = None,
    warnings: list[str] | None = None,
    finds_file: bool = True,
) -> Config:
    """Read the file, lay ``overrides`` and then environment variables over it, and check each value by itself.

    Args:
        overrides: key to (text, flag), such as ``{"model_store": ("store", "--model-store")}``.
        ts_config: value of ``--ts-config``.
        environ: environment variables; the process's own by default.
        warnings: becomes ``Config.warnings``; holds those found so far when an error is raised.
        finds_file: without ``ts_config`` the file is looked for where ``pyserve start`` looks; else there is none.

    Raises:
        ConfigError: names the place, the key, the value and what is allowed.
    """
    environ = os.environ if environ is None else environ
    config = Config(warnings=[] if warnings is None else warnings)
    path = _config_path(ts_config, environ, config.warnings) if finds_file or ts_config else None
    settings: dict[str, list[_Setting]] = {}  # the weakest first
    switches: set[str] = set()
    if path is not None:
        settings, switches = _read_file(path, environ, config)
    for key, (text, flag) in (overrides or {}).items():
        settings.setdefault(key, []).append(_Setting(text, flag))
    config.warnings += misspelt(environ)
    for key, text, variable in settings_of(environ, switches):
        for other in settings.get(key, []):
            if other.place.startswith("--") and other.text != text:
                config.warnings.append(f"{other.place} {other.text} is not used, because ${variable} is set")
        settings.setdefault(key, []).append(_Setting(text, f"${variable}"))
    for key in KINDS:
        if key in settings:
            *losers, winner = settings[key]
            setattr(config, key, _value(key, winner))
            config.origin[key] = winner.place
            if losers:
                config.overridden[key] = [[each.place, each.text.strip()] for each in reversed(losers)]
        else:
            config.origin[key] = "default"
    return config


def _config_path(ts_config: str | None, environ: Mapping[str, str], warnings: list[str]) -> Path | None:
    from_environment = environ.get("TS_CONFIG_FILE")
    if from_environment:
        if ts_config and Path(ts_config).absolute() != Path(from_environment).absolute():
            warnings.append(f"--ts-config {ts_config} is not used, because TS_CONFIG_FILE={from_environment} is set")
        return _existing(from_environment, "TS_CONFIG_FILE")
    if ts_config:
        return _existing(ts_config, "--ts-config")
    default = Path(CONFIG_FILE_DEFAULT)
    return default if default.is_file() else None


def _existing(path: str, flag: str) -> Path:
    if not Path(path).is_file():
        raise ConfigError(f"{flag} file not found: {path}")
    return Path(path)


def _read_file(path: Path, environ: Mapping[str, str], config: Config) -> tuple[dict[str, list[_Setting]], set[str]]:
    """The settings of a file, repeated ones in order, and which switches that are none of ours are ``true``."""
    try:
        entries = parse_properties(_read_text(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except PropertiesError as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from None
    settings: dict[str, list[_Setting]] = {}
    switches: set[str] = set()
    lines: dict[str, int] = {}
    unused: dict[str, list[str]] = {}  # why -> keys
    for entry in entries:
        key, place = entry.key, f"{path}:{entry.line}"
        if key in lines:
            told = f"{place}: {key} was set in line {lines[key]} already; line {entry.line} counts"
            config.repeated_keys.append(told)
            config.warnings.append(told)
        lines[key] = entry.line
        if key in KINDS and key not in FLAG_ONLY:
            settings.setdefault(key, []).append(_Setting(_substitute(entry, place, environ), place))
        elif key in SNAPSHOT_KEYS:
            continue
        elif key in SWITCH_KEYS:
            (switches.add if entry.value.strip() == "true" else switches.discard)(key)
        elif key in ACCEPTED_KEYS:
            keys = unused.setdefault(ACCEPTED_KEYS[key], [])
            keys += [key] if key not in keys else []
        else:
            config.unknown_keys.append(f"{place}: unknown key {key!r}{nearest_of_file(key)}")
            config.warnings.append(config.unknown_keys[-1])
    if unused:
        told = "; ".join(f"{', '.join(keys)} ({why})" for why, keys in unused.items())
        config.notices.append(f"{path}: accepted, without effect here: {told}")
    return settings, switches


def _read_text(path: Path) -> str:
    with open(path, "rb") as file:
        content = file.read(CONFIG_FILE_SIZE_MAX + 1)
    if len(content) > CONFIG_FILE_SIZE_MAX:
        raise ConfigError(f"{path} is larger than {CONFIG_FILE_SIZE_MAX} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")  # what Java reads properties files as


def _substitute(entry: Property, place: str, environ: Mapping[str, str]) -> str:
    """Put environment variables in the place of ``$$NAME$$``."""

    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        if name not in environ:
            raise ConfigError(f"{place}: {entry.key} names the environment variable {name}, which is not set")
        return environ[name]

    return _VARIABLE.sub(value_of, entry.value)


def _value(key: str, setting: _Setting) -> Any:
    kind = KINDS[key]
    text = setting.text.strip()
    try:
        return kind.parse(text)
    except ValueError as error:
        shown = text if len(text) <= 80 else text[:77] + "..."
        reason = f"; {error}" if str(error) and not str(error).startswith("allowed") else ""
        raise ConfigError(
            f"{setting.place}: {key} cannot be {shown!r}; allowed: {kind.allowed}{reason}",
            detail={"key": key, "value": text, "place": setting.place},
        ) from None


def check_keys(config: Config) -> None:
    """Under ``strict`` every key must be known, and set once.

    Raises:
        UnknownKeyError: names those that are not.
    """
    wrong = config.unknown_keys + config.repeated_keys
    if config.strict and wrong:
        raise UnknownKeyError(f"strict ({config.origin['strict']}): {'; '.join(wrong)}")


def check_config(config: Config, *, needs_models: bool = True) -> None:
    """The rules that concern more than the text of one value.

    Args:
        needs_models: there must be a model store, or models to load.

    Raises:
        MissingStoreError, ConfigError: it cannot be used.
    """
    store_place = config.origin["model_store"]
    if config.model_store:
        store = Path(config.model_store).expanduser().absolute()
        if not store.is_dir():
            raise ConfigError(f"--model-store directory not found: {store} ({store_place})")
        config.model_store = str(store)
    else:
        config.model_store = None
    config.warnings += [f"model store: {problem}; it is passed over" for problem in store_problems(config.model_store)]
    if config.state_dir:
        config.state_dir = str(Path(config.state_dir).expanduser().absolute())
    try:
        sources = config.models_to_load()
    except ValueError as error:
        raise ConfigError(f"{config.origin['load_models']}: {error}") from None
    if config.model_snapshot and config.load_models:
        config.notices.append(
            f"{config.origin['load_models']}: load_models is ignored: {config.origin['model_snapshot']} has a "
            "model_snapshot"
        )
    if needs_models and config.model_store is None and (not sources or not all(source.exists for source in sources)):
        raise MissingStoreError(
            "Missing mandatory parameter --model-store; give the folder with the archives, here or as model_store in "
            "config.properties, or a model: `pyserve start net.pt`"
        )
    for name, versions in config.models.items():
        for version, settings in versions.items():
            for key in settings.keys() - MODEL_SETTINGS.keys():
                what = f"{name} {version}: unknown setting {key!r}{nearest(key, MODEL_SETTINGS)}"
                config.warnings.append(f"{config.origin['models']}: models: {what}")
