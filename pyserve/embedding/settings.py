"""The configuration of an engine without a process of its own."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from pyserve.archive.limits import KEYS as ARCHIVE_KEYS
from pyserve.archive.limits import use_limits
from pyserve.config.address import Address
from pyserve.config.config import Config, check_config, check_keys, read_config
from pyserve.config.keys import KINDS
from pyserve.config.nearest import nearest
from pyserve.errors import ConfigError

log = logging.getLogger("pyserve.embedded")

# What is of a server process, by the beginnings of its keys, and what is in its place.
_PLACES = {
    "inference_address": "the server that the ASGI application runs under listens",
    "management_address": "give `pyserve.asgi.management(engine)` to a server",
    "metrics_address": "the ASGI application has /metrics; enable_metrics_api=False takes it away",
    "load_models": "give models=",
    "front_ends": "start more processes, each with an engine",
    "grpc_": "there is no gRPC",
    "enable_grpc": "there is no gRPC",
    "private_key_file": "give the certificate to the server that the ASGI application runs under",
    "certificate_file": "give the certificate to the server that the ASGI application runs under",
    "keystore": "give the certificate to the server that the ASGI application runs under",
    "console": "its page is a server's",
    "log_format": "configure Python's logging",
    "log_level": "configure Python's logging",
    "metrics_mode": "ask for /metrics; there are no log files",
    "model_snapshot": "there are no snapshots",
    "restore": "there are no snapshots",
    "no_config_snapshots": "there are no snapshots",
    "state_dir": "there is no state file",
    "strict": "a model that cannot be loaded ends the start anyhow",
    "watch": "it is for `pyserve dev`",
    "drain_delay_s": "drain before you stop the engine",
}
# Who can reach what an HTTP server makes of the application is not known: it is taken for anybody.
_ANYWHERE = Address("0.0.0.0", 1)


def process_keys(keys: Iterable[str]) -> list[str]:
    """Those of ``keys`` that are of a server process, or of what an engine is given otherwise."""
    return [key for key in keys if key == "model_store" or key.startswith(tuple(_PLACES))]


def engine_config(values: Mapping[str, Any], config_file: str | os.PathLike[str] | None) -> Config:
    """The keys of config.properties with ``values`` of Python, over those of environment variables and of the file.

    Raises:
        ConfigError: names the key, the value and what is allowed.
    """
    for key in values:
        if key not in KINDS:
            raise ConfigError(f"config: unknown key {key!r}{nearest(key, KINDS)}")
        place = next((text for start, text in _PLACES.items() if key.startswith(start)), None)
        if place is not None and not (key == "enable_grpc" and values[key] in (False, "false")):
            raise ConfigError(f"config: {key} is for a server process, and an embedded engine is none: {place}")
    given = {key: (_text(key, value), f"config[{key!r}]") for key, value in values.items() if value is not None}
    hidden = {"TS_CONFIG_FILE", *(f"{start}{key.upper()}" for key in values for start in ("PYSERVE_", "TS_"))}
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    path = None if config_file is None else os.fspath(config_file)
    config = read_config(given, ts_config=path, environ=environ, finds_file=False)
    config.inference_address = config.management_address = config.metrics_address = _ANYWHERE
    config.enable_grpc, config.console = "false", False
    config.load_models, config.model_snapshot, config.restore, config.no_config_snapshots = "", {}, False, True
    config.metrics_mode = "prometheus"
    check_keys(config)
    check_config(config, needs_models=False)
    for text in config.warnings:
        log.warning("%s", text)
    if any(config.origin[key] != "default" for key in ARCHIVE_KEYS.values()):
        use_limits(config)
    return config


def _text(key: str, value: Any) -> str:
    """As it would stand in the file."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        raise ConfigError(f"config: {key} cannot be a {type(value).__name__}; allowed: {KINDS[key].allowed}") from None
