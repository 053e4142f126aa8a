"""``pyserve config``: every setting that is in effect, where its value comes from, and what that goes before."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pyserve.archive.archive import open_archive
from pyserve.archive.manifest import name_of_file
from pyserve.archive.model_config import ModelConfig, config_lines
from pyserve.commands import terminal as console
from pyserve.config.config import Config, MissingStoreError, check_config, check_keys, read_config
from pyserve.config.keys import FLAG_ONLY, KINDS, SECRET_KEYS
from pyserve.config.model_source import ModelSource
from pyserve.errors import ConfigError, JsonObject, ServeError
from pyserve.lanes.settings import BLOCK_KEYS, YAML_ATTRIBUTES, ModelSettings, first_settings, first_workers

VALUE_SHOWN_MAX = 60
HIDDEN = "(hidden)"
# Attribute of ModelSettings -> the server-wide key that is its default.
_SERVER_KEYS = {
    "response_timeout_s": "default_response_timeout",
    "startup_timeout_s": "default_startup_timeout",
    "queue_size": "job_queue_size",
}
_WORKER_KEYS = {"workers_min": "minWorkers", "workers_max": "maxWorkers"}
# As management parameters and model-config.yaml call them, where that is not the attribute's name.
_NAMES = {
    "max_batch_delay_ms": "max_batch_delay", "response_timeout_s": "response_timeout", "workers_min": "min_workers",
    "startup_timeout_s": "startup_timeout", "queue_size": "job_queue_size", "client_timeout_ms": "client_timeout",
    "workers_max": "max_workers",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        origin: the place that counts.
        overridden: (place, value) of those that it goes before, the strongest first.
    """

    key: str
    value: Any
    origin: str
    overridden: list[tuple[str, Any]] = field(default_factory=list)

    def line(self, width: int) -> str:
        """``job_queue_size = 8   config.properties:3 (overrides config.properties:1 = 1)``."""
        losers = ", ".join(f"{place} = {_shown(value)}" for place, value in self.overridden)
        return f"{f'{self.key} = {_shown(self.value)}':<{width}}  {self.origin}" + (
            f" (overrides {losers})" if losers else ""
        )

    def to_json(self) -> JsonObject:
        return {
            "value": self.value, "origin": self.origin,
            "overrides": [{"origin": place, "value": value} for place, value in self.overridden],
        }  # fmt: skip


@dataclass
class ModelReport:
    """The settings of one model; ``error`` instead if its archive cannot be opened."""

    name: str
    version: str = ""
    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: str = ""


def config_command(overrides: Mapping[str, tuple[str, str]], parsed: argparse.Namespace) -> int:
    """Prints the report. Exit code: 0; 1 if the configuration cannot be used; 2 for unknown keys under ``--strict``.

    Raises:
        ConfigError: a value cannot be read.
    """
    warnings: list[str] = []
    try:
        config = read_config(overrides, ts_config=parsed.ts_config, warnings=warnings)
    except ConfigError:
        console.warn(warnings)
        raise
    rows = server_rows(config)
    problem: ConfigError | None = None
    try:
        check_config(config)
    except ConfigError as error:
        problem = error
    models = [model_report(config, source) for source in config.models_to_load()] if problem is None else []
    try:
        check_keys(config)
    except ConfigError as error:
        problem = error
    if parsed.json:
        print(json.dumps(_as_json(config, rows, models, problem), indent=2, default=str))
    else:
        _print(config, rows, models)
    if problem is None:
        return 0
    if isinstance(problem, MissingStoreError):  # so it is wherever models are not named by the file
        console.warn([f"`pyserve start` would say: {problem.message}"], kind="note")
        return 0
    console.warn([problem.message], kind="error")
    return int(getattr(problem, "exit_code", 1))


def server_rows(config: Config) -> list[Row]:
    """All settings under their names in config.properties; of the secret ones, whether they are set."""
    values = config.to_json()
    values |= {key: HIDDEN for key in SECRET_KEYS if config.origin[key] != "default"}
    return [
        Row(
            key, values[key], config.origin[key],
            [(place, HIDDEN if key in SECRET_KEYS else text) for place, text in config.overridden.get(key, [])],
        )
        for key in KINDS
        if key not in FLAG_ONLY
    ]  # fmt: skip


def model_report(config: Config, source: ModelSource) -> ModelReport:
    """The settings that a model would start with."""
    label = source.name or Path(source.path_or_file).name
    if "://" in source.path_or_file:
        return ModelReport(label, error=f"{source.shown}: it is fetched when the server starts; its settings show then")
    try:
        with open_archive(source.path_or_file) as archive:
            manifest = archive.manifest
            name = source.name or manifest.model_name or name_of_file(archive.name)
            version = manifest.model_version
            lines: dict[str, int] = {}
            if manifest.config_file is not None:
                lines = config_lines(archive.config.text)
            block = config.models.get(name, {}).get(version, {})
            settings = first_settings(config, archive.config, block, {}, archive.name)
            settings.workers_min, settings.workers_max = first_workers(config, archive.config, block, None)
            file = manifest.config_file or ""
            found = _Sources(config, archive.config, block, {key: f"{file}:{line}" for key, line in lines.items()})
            rows = [found.row(attribute, getattr(settings, attribute)) for attribute in vars(settings)]
            return ModelReport(name, version, rows, archive.warnings)
    except (ServeError, OSError, yaml.YAMLError) as error:
        return ModelReport(label, error=" ".join(str(error).split()))


class _Sources:
    """Where a model's settings may come from: model-config.yaml, the ``models`` block, the server's own, the default.

    Args:
        places: key of model-config.yaml -> its place.
    """

    def __init__(self, config: Config, model_config: ModelConfig, block: Mapping[str, Any], places: dict[str, str]):
        self._config = config
        self._yaml = model_config
        self._block = block
        self._places = places
        self._block_keys = {attribute: key for key, attribute in BLOCK_KEYS.items()} | _WORKER_KEYS

    def row(self, attribute: str, value: Any) -> Row:
        """The setting, and every place that names it."""
        found = []
        if attribute in YAML_ATTRIBUTES or attribute in _WORKER_KEYS:
            given = getattr(self._yaml, attribute)
            if given is not None:
                key = ModelConfig.key_of(attribute)
                found.append((self._places.get(key, key), given))
        block_key = self._block_keys.get(attribute)
        given = self._block.get(block_key) if block_key is not None else None
        if isinstance(given, int) and given > 0:
            found.append((f"{self._config.origin['models']} models", given))
        server_key = _SERVER_KEYS.get(attribute)
        if attribute in _WORKER_KEYS and self._config.default_workers_per_model:
            server_key = "default_workers_per_model"
        if server_key is not None and self._config.origin[server_key] != "default":
            found.append((f"{self._config.origin[server_key]} {server_key}", getattr(self._config, server_key)))
        key = _NAMES.get(attribute, attribute)
        # Workers are taken as a pair, or not at all; what does not count is told as overridden.
        winner = next((each for each in found if each[1] == value), ("default", value))
        return Row(key, value, winner[0], [each for each in found if each != winner])


def _as_json(config: Config, rows: list[Row], models: list[ModelReport], problem: ConfigError | None) -> JsonObject:
    return {
        "settings": {row.key: row.to_json() for row in rows},
        "models": [
            {"name": each.name, "version": each.version, "error": each.error, "warnings": each.warnings,
             "settings": {row.key: row.to_json() for row in each.rows}}
            for each in models
        ],
        "unknown_keys": config.unknown_keys,
        "warnings": config.warnings,
        "notices": config.notices,
        "problem": problem.message if problem is not None else None,
    }  # fmt: skip


def _print(config: Config, rows: list[Row], models: list[ModelReport]) -> None:
    width = min(VALUE_SHOWN_MAX, max(len(f"{row.key} = {_shown(row.value)}") for row in rows))
    for row in rows:
        print(row.line(width))
    for model in models:
        print(f"\n{model.name} {model.version}".rstrip() + (f": {model.error}" if model.error else ""))
        for row in model.rows:
            print(f"  {row.line(width - 2)}")
    console.warn([*config.warnings, *(text for model in models for text in model.warnings)])
    console.warn(config.notices, kind="note")


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "-"
    text = json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)
    return text if len(text) <= VALUE_SHOWN_MAX else text[: VALUE_SHOWN_MAX - 3] + "..."


assert set(YAML_ATTRIBUTES) | set(_WORKER_KEYS) == set(vars(ModelSettings()))
