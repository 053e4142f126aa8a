"""Every key of config.properties by the contract's table: default, environment variable, good and bad values, order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyserve.archive.model_config import ModelConfig
from pyserve.config.config import Config, UnknownKeyError, load_config
from pyserve.config.keys import ACCEPTED_KEYS, KINDS, OWN_VARIABLES, SNAPSHOT_KEYS, SWITCH_KEYS, VARIABLES
from pyserve.errors import ConfigError
from pyserve.lanes.settings import first_settings, first_workers

NO_TS = None  # no TS_ variable
# key, default, a good text, what it means, a bad text ("" if every text is good), TorchServe's variable
TABLE: list[tuple[str, Any, str, Any, str, str | None]] = [
    ("inference_address", "http://127.0.0.1:8080", "https://h", "https://h:443", "ftp://h", "TS_INFERENCE_ADDRESS"),
    ("management_address", "http://127.0.0.1:8081", "https://h", "https://h:8444", "h:1", "TS_MANAGEMENT_ADDRESS"),
    ("metrics_address", "http://127.0.0.1:8082", "https://h", "https://h:8445", "http://", "TS_METRICS_ADDRESS"),
    ("grpc_inference_address", "127.0.0.1", "::", "::", "localhost", "TS_GRPC_INFERENCE_ADDRESS"),
    ("grpc_management_address", "127.0.0.1", "0.0.0.0", "0.0.0.0", "h", "TS_GRPC_MANAGEMENT_ADDRESS"),
    ("grpc_inference_port", 7070, "7072", 7072, "65536", "TS_GRPC_INFERENCE_PORT"),
    ("grpc_management_port", 7071, "7073", 7073, "-1", "TS_GRPC_MANAGEMENT_PORT"),
    ("grpc_inference_max_connection_age_ms", None, "9", 9, "0", "TS_GRPC_INFERENCE_MAX_CONNECTION_AGE_MS"),
    ("grpc_inference_max_connection_age_grace_ms", None, "9", 9, "x", "TS_GRPC_INFERENCE_MAX_CONNECTION_AGE_GRACE_MS"),
    ("grpc_management_max_connection_age_ms", None, "9", 9, "1.5", "TS_GRPC_MANAGEMENT_MAX_CONNECTION_AGE_MS"),
    ("grpc_management_max_connection_age_grace_ms", None, "9", 9, "x",
     "TS_GRPC_MANAGEMENT_MAX_CONNECTION_AGE_GRACE_MS"),
    ("enable_grpc_ssl", False, "true", True, "1", "TS_ENABLE_GRPC_SSL"),
    ("load_models", "", "a.mar", "a.mar", "", "TS_LOAD_MODELS"),
    ("models", {}, '{"m": {}}', {"m": {}}, "[]", NO_TS),
    ("model_snapshot", {}, '{"name": "x"}', {"name": "x"}, "x", NO_TS),
    ("default_workers_per_model", 0, "3", 3, "-1", "TS_DEFAULT_WORKERS_PER_MODEL"),
    ("default_response_timeout", 120, "5", 5, "0", "TS_DEFAULT_RESPONSE_TIMEOUT"),
    ("default_startup_timeout", 120, "5", 5, "x", "TS_DEFAULT_STARTUP_TIMEOUT"),
    ("unregister_model_timeout", 120, "5", 5, "x", "TS_UNREGISTER_MODEL_TIMEOUT"),
    ("job_queue_size", 100, "+7", 7, "7.5", "TS_JOB_QUEUE_SIZE"),
    ("number_of_gpu", None, "0", 0, "all", "TS_NUMBER_OF_GPU"),
    ("max_request_size", 6553500, "1", 1, "0", "TS_MAX_REQUEST_SIZE"),
    ("max_response_size", 6553500, "2147483647", 2147483647, "2147483648", "TS_MAX_RESPONSE_SIZE"),
    ("limit_max_image_pixels", True, "false", False, "no", "TS_LIMIT_MAX_IMAGE_PIXELS"),
    ("decode_input_request", True, "false", False, "0", "TS_DECODE_INPUT_REQUEST"),
    ("default_service_handler", "", "m:f", "m:f", "", "TS_DEFAULT_SERVICE_HANDLER"),
    ("service_envelope", "", "kserve", "kserve", "k/s", "TS_SERVICE_ENVELOPE"),
    ("allowed_urls", "", "file:///m/.*", "file:///m/.*", "", "TS_ALLOWED_URLS"),
    ("install_py_dep_per_model", False, "true", True, "y", "TS_INSTALL_PY_DEP_PER_MODEL"),
    ("blacklist_env_vars", "", "SECRET.*", "SECRET.*", "(", "TS_BLACKLIST_ENV_VARS"),
    ("disable_token_authorization", None, "true", True, "y", "TS_DISABLE_TOKEN_AUTHORIZATION"),
    ("token_expiration_min", 60.0, "1.5", 1.5, "0", "TS_TOKEN_EXPIRATION_TIME_MIN"),
    ("enable_model_api", None, "true", True, "y", "TS_ENABLE_MODEL_API"),
    ("enable_metrics_api", True, "false", False, "y", "TS_ENABLE_METRICS_API"),
    ("metrics_mode", "", "log", "log", "loud", "TS_METRICS_MODE"),
    ("metrics_config", "", "m.yaml", "m.yaml", "", "TS_METRICS_CONFIG"),
    ("model_metrics_auto_detect", False, "true", True, "y", "TS_MODEL_METRICS_AUTO_DETECT"),
    ("disable_system_metrics", False, "true", True, "y", "TS_DISABLE_SYSTEM_METRICS"),
    ("metric_time_interval", 60, "5", 5, "0", NO_TS),
    ("initial_worker_port", 9000, "9500", 9500, "0", "TS_INITIAL_WORKER_PORT"),
    ("cors_allowed_origin", "", "http://o", "http://o", "", "TS_CORS_ALLOWED_ORIGIN"),
    ("cors_allowed_methods", "", "GET", "GET", "", "TS_CORS_ALLOWED_METHODS"),
    ("cors_allowed_headers", "", "x-a", "x-a", "", "TS_CORS_ALLOWED_HEADERS"),
    ("keystore", "", "k.p12", "k.p12", "", "TS_KEYSTORE"),
    ("keystore_pass", "changeit", "s", "s", "", "TS_KEYSTORE_PASS"),
    ("keystore_type", "PKCS12", "PKCS12", "PKCS12", "", "TS_KEYSTORE_TYPE"),
    ("private_key_file", "", "k.pem", "k.pem", "", "TS_PRIVATE_KEY_FILE"),
    ("certificate_file", "", "c.pem", "c.pem", "", "TS_CERTIFICATE_FILE"),
    ("ipex_enable", False, "true", True, "y", "TS_IPEX_ENABLE"),
    ("ipex_gpu_enable", False, "true", True, "y", "TS_IPEX_GPU_ENABLE"),
    ("debug", False, "true", True, "y", "TS_DEBUG"),
    ("ts_open_inference_protocol", False, "oip", True, "v2", "TS_OPEN_INFERENCE_PROTOCOL"),
    ("ts_header_key_sequence_id", "ts_request_sequence_id", "s", "s", "a b", "TS_HEADER_KEY_SEQUENCE_ID"),
    ("ts_header_key_sequence_start", "ts_request_sequence_start", "s", "s", ":", "TS_HEADER_KEY_SEQUENCE_START"),
    ("ts_header_key_sequence_end", "ts_request_sequence_end", "s", "s", "é", "TS_HEADER_KEY_SEQUENCE_END"),
]  # fmt: skip
# Of the contract's table, what has no effect here, or is no setting.
OTHERS = {
    "async_logging", "number_of_netty_threads", "netty_client_threads", "use_native_io", "io_ratio",
    "prefer_direct_buffer", "initial_distribution_port", "cpu_launcher_enable", "cpu_launcher_args", "cpp_log_config",
    "model_server_home", "vmargs", "plugins_path", "python", "workflow_store", "NUM_WORKERS",
    "enable_envvars_config", "use_env_allowed_urls", "version", "tsConfigFile",
}  # fmt: skip
BY_KEY = pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "store").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str = "", environ: dict[str, str] | None = None, flags: dict[str, str] | None = None) -> Config:
    Path("config.properties").write_text(f"model_store=store\n{text}\n")
    overrides = {key: (value, "--" + key.replace("_", "-")) for key, value in (flags or {}).items()}
    return load_config(overrides, environ=environ or {})


def shown(value: Any) -> Any:
    return str(value) if type(value).__name__ == "Address" else value


def test_every_key_of_the_contract_is_here() -> None:
    assert {row[0] for row in TABLE} | {"model_store"} <= KINDS.keys()
    assert ACCEPTED_KEYS.keys() | SNAPSHOT_KEYS | SWITCH_KEYS >= OTHERS


@BY_KEY
def test_default_and_value_of_the_file(row: tuple[str, Any, str, Any, str, str | None]) -> None:
    key, default, good, value, bad, _ = row
    assert shown(getattr(read(), key)) == default
    config = read(f"{key}={good}")
    assert shown(getattr(config, key)) == value
    assert config.origin[key] == "config.properties:2"
    assert (config.warnings, config.unknown_keys) == ([], [])
    if bad:
        with pytest.raises(ConfigError, match=rf"config\.properties:2: {key} cannot be .*; allowed: "):
            read(f"{key}={bad}")


@BY_KEY
def test_torchserves_variable(row: tuple[str, Any, str, Any, str, str | None]) -> None:
    key, default, good, value, _, variable = row
    assert VARIABLES.get(key) == variable
    if variable is None:
        return
    told = {variable: good}
    always = key == "ts_open_inference_protocol"
    assert shown(getattr(read(environ=told), key)) == (value if always else default)
    switches = "enable_envvars_config=true\nuse_env_allowed_urls=true"
    config = read(switches, told)
    assert (shown(getattr(config, key)), config.origin[key]) == (value, f"${variable}")
    assert config.notices == []


@BY_KEY
def test_our_own_variable_needs_no_switch(row: tuple[str, Any, str, Any, str, str | None]) -> None:
    key, _, good, value, bad, _ = row
    variable = f"PYSERVE_{key.upper()}"
    assert OWN_VARIABLES[key] == variable
    config = read(environ={variable: good})
    assert (shown(getattr(config, key)), config.origin[key]) == (value, f"${variable}")
    if bad:
        with pytest.raises(ConfigError, match=rf"\${variable}: {key} cannot be"):
            read(environ={variable: bad})


LEVELS = ("file", "flag", "TS_", "PYSERVE_")


@pytest.mark.parametrize(
    "levels", [[level for i, level in enumerate(LEVELS) if n >> i & 1] for n in range(1, 16)], ids="+".join
)
def test_the_strongest_place_that_says_something_wins(levels: list[str]) -> None:
    values = {level: str(number) for number, level in enumerate(LEVELS, start=1)}
    lines = ["enable_envvars_config=true"] + ([f"job_queue_size={values['file']}"] if "file" in levels else [])
    environ = {f"{level}JOB_QUEUE_SIZE": values[level] for level in ("TS_", "PYSERVE_") if level in levels}
    flags = {"job_queue_size": values["flag"]} if "flag" in levels else {}
    config = read("\n".join(lines), environ, flags)
    assert config.job_queue_size == int(values[levels[-1]])
    assert [text for _, text in config.overridden.get("job_queue_size", [])] == [
        values[level] for level in reversed(levels[:-1])
    ]
    variables = [level for level in levels if level.endswith("_")]
    assert len(config.warnings) == (len(variables) if "flag" in levels else 0)
    for warning, variable in zip(config.warnings, variables, strict=False):
        assert warning == f"--job-queue-size 2 is not used, because ${variable}JOB_QUEUE_SIZE is set"


def test_an_empty_variable_is_not_set() -> None:
    environ = {"PYSERVE_JOB_QUEUE_SIZE": "", "TS_JOB_QUEUE_SIZE": "", "PYSERVE_MODEL_STORE": ""}
    assert read("enable_envvars_config=true\njob_queue_size=7", environ).job_queue_size == 7


def test_a_misspelt_variable_is_named_and_others_are_left_alone() -> None:
    environ = {
        "PYSERVE_JOB_QUEU_SIZE": "1", "PYSERVE_CACHE": "x", "PYSERVE_SERVICE_HOST": "10.0.0.1",
        "PYSERVE_PORT": "tcp://10.0.0.1:80", "PYSERVE_PORT_8080_TCP_ADDR": "10.0.0.1", "PYSERVE_SERVICE_PORT_HTTP": "1",
    }  # fmt: skip
    assert read(environ=environ).warnings == [
        "the environment variable PYSERVE_JOB_QUEU_SIZE is not known; did you mean PYSERVE_JOB_QUEUE_SIZE?"
    ]


def test_a_key_that_stands_twice_is_an_error_under_strict() -> None:
    with pytest.raises(UnknownKeyError, match=r"job_queue_size was set in line 2 already; line 3 counts"):
        read("job_queue_size=1\njob_queue_size=2\nstrict=true")


def parse(yaml: str) -> ModelConfig:
    return ModelConfig.parse(yaml.encode(), "m.mar")


def test_debug_means_one_worker_and_no_time_limit() -> None:
    config = read("debug=true\ndefault_workers_per_model=4\ndefault_response_timeout=5")
    yaml = parse("minWorkers: 3\nmaxWorkers: 3\nresponseTimeout: 7\n")
    settings = first_settings(config, yaml, {}, {"response_timeout": 9}, "m")
    assert (settings.response_timeout_s, settings.startup_timeout_s) == (86400, 86400)
    assert first_workers(config, yaml, {}, 2) == (1, 1)


@pytest.mark.parametrize(
    ("text", "gpus", "workers"),
    [
        ("", 0, 1), ("", 2, 2), ("compat=strict\ncpu_budget=3", 0, 3), ("compat=strict\ncpu_budget=3", 2, 2),
        ("compat=strict\ndefault_workers_per_model=5", 2, 5),
    ],
)  # fmt: skip
def test_strict_starts_a_worker_per_cpu_or_gpu(text: str, gpus: int, workers: int) -> None:
    config = read(text)
    assert first_workers(config, parse(""), {}, None, gpus=gpus) == (workers, workers)
    assert first_workers(config, parse(""), {}, 0, gpus=gpus) == (0, 0)


@pytest.mark.parametrize(("text", "value"), [("", 9), ("compat=strict", 7)])
@pytest.mark.parametrize("name", ["response_timeout", "startup_timeout"])
def test_strict_lets_the_yaml_go_before_the_parameters_of_time_limits(text: str, value: int, name: str) -> None:
    key = {"response_timeout": "responseTimeout", "startup_timeout": "startupTimeout"}[name]
    config = read(text)
    settings = first_settings(config, parse(f"{key}: 7\nbatchSize: 2\n"), {}, {name: 9, "batch_size": 4}, "m")
    assert getattr(settings, f"{name}_s") == value
    assert settings.batch_size == 4
    assert getattr(first_settings(config, parse(""), {}, {name: 9}, "m"), f"{name}_s") == 9
