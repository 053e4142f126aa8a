"""The models that a snapshot names: the JSON object ``model_snapshot``, checked and made into what a server restores.

    {"name": "20261124105500123-startup.cfg", "modelCount": 1, "created": 1795517700123, "models": {
        "m": {"1.0": {"defaultVersion": true, "marName": "m.mar", "minWorkers": 1, "maxWorkers": 1, "batchSize": 1,
                      "maxBatchDelay": 100, "responseTimeout": 120, "startupTimeout": 120, "runtimeType": "python"}}}}

The keys are TorchServe's, and people write such objects by hand. Further ones are pyserve's own, and only there when
they say something: ``minBatch``, ``jobQueueSize``, ``clientTimeoutInMills``, ``workers`` (when they are more than
``minWorkers``), ``handler``, ``url``, ``archive`` (the path of one that is not in the model store) and ``given`` (what
the command line said about a model's file by itself, or a folder without a manifest).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pyserve.archive.given import Given, give
from pyserve.config.bounds import validate_setting
from pyserve.errors import JsonObject, ServeError

# Key -> attribute of ModelSettings.
REQUIRED_NUMBERS = {
    "minWorkers": "workers_min", "maxWorkers": "workers_max", "batchSize": "batch_size",
    "maxBatchDelay": "max_batch_delay_ms",
}  # fmt: skip
OPTIONAL_NUMBERS = {
    "responseTimeout": "response_timeout_s", "startupTimeout": "startup_timeout_s", "minBatch": "min_batch",
    "jobQueueSize": "queue_size", "clientTimeoutInMills": "client_timeout_ms",
}  # fmt: skip
_OPTIONAL_TEXTS = ("runtimeType", "handler", "url", "archive", "given")


class SnapshotError(ValueError):
    """What should be a snapshot is none; the text says why."""


class SavedModel(NamedTuple):
    """One version that is to be restored.

    Attributes:
        name, version: as the snapshot says; the archive's own version counts when it is another.
        path: of the archive.
        url: the file's name, as the management API shows it.
        is_default: whether it is its name's default version.
        settings: attribute of ModelSettings to value; the rest is as for any model.
        workers: to start.
        entry: the object that it was read from.
        problem: why it cannot be restored; ``""`` when it can be tried.
        given: as `pyserve.archive.given` writes it; ``""`` if nothing was.
    """

    name: str
    version: str
    path: str
    url: str
    handler: str | None
    is_default: bool
    settings: dict[str, int]
    workers: int
    entry: JsonObject
    problem: str
    given: str = ""


def saved_models(snapshot: JsonObject, store: str | None) -> list[SavedModel]:
    """What ``snapshot`` names, in its order. A version that is described wrongly has a ``problem``.

    Raises:
        SnapshotError: it is no object of models, versions and settings.
    """
    models = snapshot.get("models")
    if not isinstance(models, dict):
        raise SnapshotError('it has no "models", an object such as {"m": {"1.0": {"marName": "m.mar", ...}}}')
    found = []
    for name, versions in models.items():
        if not isinstance(versions, dict):
            raise SnapshotError(f"models: {name!r} is not an object of versions")
        for version, entry in versions.items():
            if not isinstance(entry, dict):
                raise SnapshotError(f"models: {name!r}, version {version!r} is not an object of settings")
            found.append(_saved_model(name, version, entry, store))
    return found


def check_complete(snapshot: JsonObject, models: list[SavedModel]) -> None:
    """That a snapshot which pyserve or TorchServe wrote has all that it was written with.

    Raises:
        SnapshotError: it has not.
    """
    count = snapshot.get("modelCount")
    if count != len(snapshot["models"]):
        raise SnapshotError(f"it says modelCount {count!r} and names {len(snapshot['models'])} models")
    problem = next((model for model in models if model.problem), None)
    if problem is not None:
        raise SnapshotError(problem.problem)


def _saved_model(name: str, version: str, entry: JsonObject, store: str | None) -> SavedModel:
    problem, settings = "", {}
    try:
        settings = _numbers(entry)
        _check_texts(entry)
    except SnapshotError as error:
        problem = f"model_snapshot: {name} {version}: {error}"
    file = str(entry.get("marName") or "").rstrip("/").rpartition("/")[2]
    own = {key: entry[key] for key in _OPTIONAL_TEXTS if isinstance(entry.get(key), str)}
    workers = entry.get("workers", settings.get("workers_min", 0))
    return SavedModel(
        name, version,
        path=own.get("archive") or os.path.join(store or "", file),
        url=own.get("url") or file,
        handler=own.get("handler"),
        is_default=entry.get("defaultVersion") is True,
        settings=settings, workers=workers, entry=entry, problem=problem, given=own.get("given", ""),
    )  # fmt: skip


def _numbers(entry: JsonObject) -> dict[str, int]:
    missing = [key for key in ("defaultVersion", "marName", *REQUIRED_NUMBERS) if key not in entry]
    if missing:
        raise SnapshotError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    settings = {}
    for key, attribute in {**REQUIRED_NUMBERS, **OPTIONAL_NUMBERS}.items():
        if key in entry:
            settings[attribute] = _number(attribute, key, entry[key])
    if settings["workers_max"] < settings["workers_min"]:
        raise SnapshotError(f"maxWorkers ({settings['workers_max']}) is less than minWorkers")
    if settings.get("min_batch", 1) > settings["batch_size"]:
        raise SnapshotError(f"minBatch ({settings['min_batch']}) is larger than batchSize ({settings['batch_size']})")
    if "workers" in entry:
        _number("workers_max", "workers", entry["workers"])
    return settings


def _number(attribute: str, key: str, value: object) -> int:
    try:
        return validate_setting(attribute, value, label=key)
    except ServeError as error:
        raise SnapshotError(error.message) from None


def _check_texts(entry: JsonObject) -> None:
    if not isinstance(entry["defaultVersion"], bool):
        raise SnapshotError("defaultVersion must be true or false")
    file = entry["marName"]
    if not isinstance(file, str) or not file.strip() or ".." in file or "\0" in file:
        raise SnapshotError("marName must be the name of a file in the model store")
    for key in _OPTIONAL_TEXTS:
        if not isinstance(entry.get(key, ""), str):
            raise SnapshotError(f"{key} must be text")


def snapshot_entry(
    settings: Mapping[str, int], *, is_default: bool, file: str, runtime: str, workers: int, parallel_level: int,
    others: Mapping[str, str | None],
) -> JsonObject:  # fmt: skip
    """The object that `saved_models` reads as the same version.

    Args:
        settings: all numbers, by their attribute of ModelSettings.
        file: the archive's name.
        workers: how many there are to be now.
        others: ``handler``, ``url``, ``archive`` and ``given``, each None when there is nothing to say.
    """
    entry: JsonObject = {"defaultVersion": is_default, "marName": file}
    number: Callable[[str], int] = settings.__getitem__
    entry |= {key: number(attribute) for key, attribute in REQUIRED_NUMBERS.items()}
    entry |= {key: number(attribute) for key, attribute in OPTIONAL_NUMBERS.items()}
    entry["runtimeType"] = runtime
    if parallel_level > 0:
        entry["parallelLevel"] = parallel_level
    if workers != settings["workers_min"]:
        entry["workers"] = workers
    return entry | {key: text for key, text in others.items() if text is not None}


def restored_state(models: list[SavedModel]) -> dict[str, Any]:
    """The same in the form of the state file; see `pyserve.models.state_file`. What was given for a file is from now on
    given for all processes."""  # fmt: skip
    whole = [model for model in models if not model.problem]
    defaults: dict[str, str] = {}
    for model in whole:
        if model.given:
            with contextlib.suppress(ValueError):  # not as we write it; the model's file then says what is missing
                give(Path(model.path), Given.from_text(model.given))
        if model.is_default:
            defaults.setdefault(model.name, model.version)
    return {
        "models": [
            {
                "path": model.path, "name": model.name, "version": model.version, "url": model.url,
                "handler": model.handler, "loaded_at_startup": True, "workers": model.workers,
                "settings": model.settings, "entry": model.entry,
            }
            for model in whole
        ],
        "defaults": defaults,
        "failures": [
            {"name": model.name, "url": model.url, "error": model.problem} for model in models if model.problem
        ],
    }  # fmt: skip
