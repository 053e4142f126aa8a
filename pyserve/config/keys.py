"""The keys of config.properties: which exist, how the text of each becomes a value, and which variables set them.

Keys that belong to TorchServe but have no effect here are listed too, so that a configuration written
for it is accepted, and a misspelt key is told apart from an unused one.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

from pyserve.config.address import Address
from pyserve.config.allowed_urls import AllowedUrls

INT32_MAX = 2**31 - 1
TIMEOUT_MAX_S = 86_400
MINUTES_MAX = 60 * 24 * 366 * 10
ModelSettings = dict[str, dict[str, dict[str, Any]]]


class Kind(NamedTuple):
    """How a value is read. ``parse`` raises ValueError; ``allowed`` ends the sentence "allowed: ..."."""

    parse: Callable[[str], Any]
    allowed: str


def _integer(low: int, high: int) -> Kind:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            raise ValueError
        value = int(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return Kind(parse, f"a whole number from {low} to {high}")


def _choice(*choices: str) -> Kind:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError
        return text

    return Kind(parse, " or ".join(choices))


def _address(port_default: int, tls_port_default: int) -> Kind:
    return Kind(
        lambda text: Address.parse(text, port_default, tls_port_default),
        "http://host[:port], https://host[:port] or unix:/path",
    )


def _parse_boolean(text: str) -> bool:
    value = {"true": True, "false": False}.get(text.lower())
    if value is None:
        raise ValueError
    return value


def _parse_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("it holds a NUL byte")
    return text


def _parse_envelope(text: str) -> str:
    if text and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError
    return text


def _parse_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"it is no regular expression: {error}") from None
    return text


def _parse_allowed_urls(text: str) -> str:
    AllowedUrls(text)
    return text


def _parse_snapshot(text: str) -> Any:
    """A JSON object; ``{}`` when there is none. What is in it is judged when it is restored."""
    if not text:
        return {}
    try:
        snapshot = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(snapshot, dict):
        raise ValueError("it is not a JSON object")
    return snapshot


def _parse_minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes <= MINUTES_MAX:
        raise ValueError
    return minutes


def _parse_ip(text: str) -> str:
    return str(ipaddress.ip_address(text.strip("[]")))


def _parse_header(text: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", text):
        raise ValueError
    return text


def _parse_open_inference(text: str) -> bool:
    """``oip`` is what TorchServe's variable of that name says."""
    return text.lower() == "oip" or _parse_boolean(text)


ENVELOPES = ("body", "json", "kserve", "kservev2")
_HEADER = Kind(_parse_header, "the name of a header")
_BOOLEAN = Kind(_parse_boolean, "true or false")
_TEXT = Kind(_parse_text, "text")
_SECONDS = _integer(1, TIMEOUT_MAX_S)
_SIZE = _integer(1, INT32_MAX)
_PORT = _integer(0, 65_535)
_IP = Kind(_parse_ip, "an IP address, such as 127.0.0.1 or ::")
_MILLISECONDS = _integer(1, 2**53)

MODEL_SETTINGS: dict[str, type] = {
    "defaultVersion": bool,
    "marName": str,
    "minWorkers": int,
    "maxWorkers": int,
    "batchSize": int,
    "maxBatchDelay": int,
    "responseTimeout": int,
    "startupTimeout": int,
    "runtimeType": str,
    "parallelLevel": int,
}


def parse_models(text: str) -> ModelSettings:
    """The ``models`` block: ``{"name": {"version": {"minWorkers": 1, ...}}}``, unknown settings kept.

    Raises:
        ValueError: not JSON, or a value of the wrong type; the message names the place.
    """
    try:
        models = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(models, dict):
        raise ValueError("it is not a JSON object")
    for name, versions in models.items():
        if not isinstance(versions, dict):
            raise ValueError(f"{name!r} is not an object of versions")
        for version, settings in versions.items():
            if not isinstance(settings, dict):
                raise ValueError(f"{name!r}, version {version!r} is not an object of settings")
            for key, value in settings.items():
                wanted = MODEL_SETTINGS.get(key)
                if wanted is not None and type(value) is not wanted:
                    raise ValueError(f"{name!r}, version {version!r}: {key} is not of type {wanted.__name__}")
    return models


KINDS: dict[str, Kind] = {
    "inference_address": _address(80, 443),
    "management_address": _address(8081, 8444),
    "metrics_address": _address(8082, 8445),
    "model_store": _TEXT,
    "load_models": _TEXT,
    "models": Kind(parse_models, 'a JSON object such as {"m": {"1.0": {"minWorkers": 1}}}'),
    "default_workers_per_model": _integer(0, 1024),
    "default_response_timeout": _SECONDS,
    "default_startup_timeout": _SECONDS,
    "default_backend": _choice("auto", "torchscript", "aotinductor", "openvino"),
    "unregister_model_timeout": _SECONDS,
    "job_queue_size": _integer(1, 1_000_000),
    "queue_full_status": Kind(lambda text: int(_choice("503", "429").parse(text)), "503 or 429"),
    "queue_full_retry_after": _integer(0, TIMEOUT_MAX_S),
    "max_request_size": _SIZE,
    "max_response_size": _SIZE,
    "response_compression": _BOOLEAN,
    "response_compression_size_min": _integer(1, INT32_MAX),
    "number_of_gpu": _integer(0, 1024),
    "limit_max_image_pixels": _BOOLEAN,
    "max_image_pixels": _integer(1, 178_956_970),
    "max_image_memory": _SIZE,
    "decode_input_request": _BOOLEAN,
    "default_service_handler": _TEXT,
    "allowed_urls": Kind(_parse_allowed_urls, r"patterns such as https://models\.example\.com/.*, joined by commas"),
    "enable_model_api": _BOOLEAN,
    "model_control_on_inference": _BOOLEAN,
    "disable_token_authorization": _BOOLEAN,
    "enable_metrics_api": _BOOLEAN,
    "console": _BOOLEAN,
    "cors_allowed_origin": _TEXT,
    "cors_allowed_methods": _TEXT,
    "cors_allowed_headers": _TEXT,
    "service_envelope": Kind(_parse_envelope, ", ".join(ENVELOPES) + ", or the name of a module of envelopes"),
    "install_py_dep_per_model": _BOOLEAN,
    "blacklist_env_vars": Kind(_parse_pattern, "a regular expression of names"),
    "metrics_config": _TEXT,
    "ts_header_key_sequence_id": _HEADER,
    "ts_header_key_sequence_start": _HEADER,
    "ts_header_key_sequence_end": _HEADER,
    "token_file": _TEXT,
    "state_dir": _TEXT,
    "token_expiration_min": Kind(_parse_minutes, "minutes, more than 0"),
    "private_key_file": _TEXT,
    "certificate_file": _TEXT,
    "keystore": _TEXT,
    "keystore_pass": _TEXT,
    "keystore_type": _TEXT,
    "enable_grpc": _choice("auto", "true", "false"),
    "enable_grpc_ssl": _BOOLEAN,
    "grpc_inference_address": _IP,
    "grpc_inference_port": _PORT,
    "grpc_inference_max_connection_age_ms": _MILLISECONDS,
    "grpc_inference_max_connection_age_grace_ms": _MILLISECONDS,
    "grpc_management_address": _IP,
    "grpc_management_port": _PORT,
    "grpc_management_max_connection_age_ms": _MILLISECONDS,
    "grpc_management_max_connection_age_grace_ms": _MILLISECONDS,
    "metrics_mode": _choice("log", "prometheus", "legacy"),
    "model_metrics_auto_detect": _BOOLEAN,
    "disable_system_metrics": _BOOLEAN,
    "metric_time_interval": _SECONDS,
    "system_metrics_cmd": _TEXT,
    "model_snapshot": Kind(_parse_snapshot, 'a JSON object such as {"name": "startup.cfg", "models": {...}}'),
    "restore": _BOOLEAN,
    "no_config_snapshots": _BOOLEAN,
    "archive_unpacked_size_max": _integer(1, 2**50),
    "archive_entry_size_max": _integer(1, 2**50),
    "archive_entry_count_max": _integer(1, 10_000_000),
    "archive_ratio_max": _integer(1, 1_000_000),
    "archive_ratio_free_size": _integer(0, 2**50),
    "download_size_max": _integer(1, 2**50),
    "download_timeout_s": _SECONDS,
    "allow_private_addresses": _BOOLEAN,
    "log_format": _choice("text", "json"),
    "log_level": _choice("error", "warning", "info", "debug"),
    "server_timing": _BOOLEAN,
    "access_log": _BOOLEAN,
    "request_log": _BOOLEAN,
    "debug": _BOOLEAN,
    "ipex_enable": _BOOLEAN,
    "ipex_gpu_enable": _BOOLEAN,
    "ts_open_inference_protocol": Kind(_parse_open_inference, "true, oip or false"),
    "initial_worker_port": _integer(1, 65_535),
    "isolate_errors": _BOOLEAN,
    "watch": _BOOLEAN,
    "preprocess_threads": _integer(0, 1024),
    "drain_delay_s": _integer(0, TIMEOUT_MAX_S),
    "drain_timeout_s": _integer(0, TIMEOUT_MAX_S),
    "error_detail": _choice("auto", "full", "none"),
    "compat": _choice("default", "strict"),
    "strict": _BOOLEAN,
    "cpu_budget": _integer(0, 4096),
    "stuck_threads_max": _integer(0, 4096),
    "device_losses_max": _integer(0, 1_000_000),
    "connection_count_max": _integer(1, 1_000_000),
    "front_ends": _integer(1, 64),
}

_JAVA = "there is no JVM here"
_ONE_LOOP = "one event loop serves all connections"
_NO_TORCHRUN = "torchrun is not in this version"

# TorchServe's keys that change nothing here, and why.
ACCEPTED_KEYS: dict[str, str] = {
    "NUM_WORKERS": "it belongs to a Java plug-in",
    "async_logging": "the log never waits",
    "cpp_log_config": "there is no C++ backend to log for: TorchScript runs in the server",
    "cpu_launcher_args": "the threads of all workers share cpu_budget CPUs",
    "cpu_launcher_enable": "the threads of all workers share cpu_budget CPUs",
    "initial_distribution_port": _NO_TORCHRUN,
    "io_ratio": _JAVA,
    "model_server_home": "pyserve knows where it is installed",
    "netty_client_threads": _ONE_LOOP,
    "number_of_netty_threads": _ONE_LOOP,
    "plugins_path": "plug-ins are Java archives",
    "prefer_direct_buffer": _JAVA,
    "python": "workers run in the server's own Python, and with useVenv in one beside it",
    "use_native_io": _JAVA,
    "vmargs": _JAVA,
    "workflow_store": "workflows are not in this version",
}
# What TorchServe writes into snapshots about itself: neither said nor used.
SNAPSHOT_KEYS = frozenset({"tsConfigFile", "version"})
# Of the file only: whether environment variables are read. Only the text ``true`` counts, as there.
SWITCH_KEYS = frozenset({"enable_envvars_config", "use_env_allowed_urls"})

# What is set for each model, as the management API calls it -> as files do.
MODEL_KEYS = {
    "batch_size": "batchSize",
    "max_batch_delay": "maxBatchDelay",
    "min_workers": "minWorkers",
    "max_workers": "maxWorkers",
    "response_timeout": "responseTimeout",
    "startup_timeout": "startupTimeout",
}

# Shown to nobody.
SECRET_KEYS = frozenset({"keystore_pass"})

# Not for the file: what a command asks for.
FLAG_ONLY = frozenset({"watch"})

# Key -> TorchServe's environment variable, read with enable_envvars_config=true.
_WITHOUT_VARIABLE = FLAG_ONLY | {"models", "model_snapshot", "metric_time_interval"}
VARIABLES = {key: f"TS_{key.removeprefix('ts_').upper()}" for key in KINDS if key not in _WITHOUT_VARIABLE}
VARIABLES["token_expiration_min"] = "TS_TOKEN_EXPIRATION_TIME_MIN"
# Read whatever enable_envvars_config says.
ALWAYS_READ = frozenset({"ts_open_inference_protocol"})
# Key -> our own environment variable, which is always read.
OWN_VARIABLES = {key: f"PYSERVE_{key.upper()}" for key in KINDS if key not in FLAG_ONLY}
# Ours too, but no settings; and what Kubernetes tells every container about a service called "pyserve".
_OTHERS = frozenset({"PYSERVE_CACHE", "PYSERVE_WEIGHTS_CACHE", "PYSERVE_SERVER", "PYSERVE_SUPERVISOR"})
_NEAR = 0.85


def settings_of(environ: Mapping[str, str], switches: Container[str]) -> Iterator[tuple[str, str, str]]:
    """(key, text, variable) of every variable that counts, the weaker first. Empty ones are not set.

    Args:
        switches: those of ``enable_envvars_config`` and ``use_env_allowed_urls`` that are on.
    """
    for key, variable in VARIABLES.items():
        is_read = key in ALWAYS_READ or "enable_envvars_config" in switches
        if key == "allowed_urls":
            is_read = is_read and "use_env_allowed_urls" in switches
        if is_read and environ.get(variable):
            yield key, environ[variable], variable
    for key, variable in OWN_VARIABLES.items():
        if environ.get(variable):
            yield key, environ[variable], variable


def misspelt(environ: Mapping[str, str]) -> Iterator[str]:
    """A line for each variable that is nearly one of ours."""
    from difflib import get_close_matches

    known = set(OWN_VARIABLES.values())
    for name in sorted(environ):
        if name.startswith("PYSERVE_") and name not in known | _OTHERS:
            near = get_close_matches(name, known, n=1, cutoff=_NEAR)
            if near:
                yield f"the environment variable {name} is not known; did you mean {near[0]}?"
