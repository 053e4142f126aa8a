"""Snapshots: what a server serves, as files in TorchServe's format that ``pyserve start --restore`` reads.

Each is a config.properties of its own, ``logs/config/20261124105500123-snapshot.cfg``, with every effective setting
and the models as ``model_snapshot``. A snapshot is written under another name and then renamed, so that there is none
that is not whole, and a new one always sorts behind those that are there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from pyserve import __version__
from pyserve.config.archive_url import without_secrets
from pyserve.config.config import CONFIG_FILE_DEFAULT, Config
from pyserve.config.keys import FLAG_ONLY, KINDS, SECRET_KEYS
from pyserve.config.properties import format_properties, parse_properties
from pyserve.errors import JsonObject
from pyserve.models.snapshot_models import SavedModel, SnapshotError, check_complete, saved_models
from pyserve.os_errors import cause_of
from pyserve.regular_file import open_regular

log = logging.getLogger(__name__)

STARTUP, CHANGE, SHUTDOWN = "startup", "snapshot", "shutdown"
SNAPSHOT_COUNT_MAX = 20
"""Snapshots that are kept; the oldest go first."""
SNAPSHOT_SIZE_MAX = 64 << 20
"""Bytes; a larger file is not read."""

# How a server was started is not for the next one, and a snapshot lies where logs lie.
_LEFT_OUT = FLAG_ONLY | SECRET_KEYS | {"model_snapshot", "restore"}
_NAME = re.compile(r"([0-9]{17})-(startup|snapshot|shutdown)\.cfg", re.ASCII)
_DRAFT_PREFIX = ".snapshot-"
_DRAFT_AGE_MAX_S = 60.0


def snapshot_folder() -> Path:
    """``$LOG_LOCATION/config``, or ``./logs/config``."""
    return Path(os.environ.get("LOG_LOCATION") or "logs", "config")


def write_durably(
    path: Path, content: bytes, *, draft_prefix: str, on_step: Callable[[str], None] = lambda _: None
) -> None:
    """Puts a file with ``content`` in the place of ``path`` in one step; it is on the disk when this returns.

    Args:
        on_step: told of each step that is done; for tests, which end there.

    Raises:
        OSError: nothing has changed, or the new file is there and only its directory could not be synced.
    """
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=draft_prefix)
    try:
        with open(descriptor, "wb") as file:
            on_step("created")
            file.write(content)
            file.flush()
            on_step("written")
            os.fsync(file.fileno())
        on_step("synced")
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
    on_step("renamed")
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    on_step("folder synced")


class SnapshotFolder:
    """The snapshots of one log folder. Not for two threads at a time.

    Args:
        on_step: see `write_durably`.
    """

    def __init__(self, path: Path, config: Config, *, on_step: Callable[[str], None] = lambda _: None):
        self.path = path
        self._config = config
        self._on_step = on_step
        self._is_failing = False

    def write(self, kind: str, models: JsonObject) -> str:
        """Adds a snapshot, and removes the oldest beyond SNAPSHOT_COUNT_MAX. What cannot be written is warned of once.

        Args:
            kind: STARTUP, CHANGE or SHUTDOWN.
            models: name to version to settings, as in `pyserve.models.snapshot_models`.

        Returns:
            Why there is none, as a sentence; ``""`` if there is.
        """
        try:
            self._write(kind, models)
        except OSError as error:
            cause = cause_of(error)
            if not self._is_failing:
                log.warning("snapshots cannot be written to %s: %s; changes made now are not there for --restore. Set "
                            "LOG_LOCATION to a folder that can be written, or no_config_snapshots=true",
                            self.path, cause)  # fmt: skip
            self._is_failing = True
            return f"No snapshot could be written to the log folder, so that --restore will not know of it: {cause}."
        if self._is_failing:
            log.info("snapshots are written to %s again", self.path)
        self._is_failing = False
        return ""

    def _write(self, kind: str, models: JsonObject) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        present = snapshot_names(self.path)
        name = _next_name(kind, present)
        content = format_snapshot(self._config, models, name).encode("ascii")
        write_durably(self.path / name, content, draft_prefix=_DRAFT_PREFIX, on_step=self._on_step)
        for old in [*present, name][:-SNAPSHOT_COUNT_MAX]:
            with contextlib.suppress(OSError):  # gone already, or no file: the one that is written counts
                (self.path / old).unlink()
        if kind == STARTUP:
            self._remove_drafts()
        self._on_step("pruned")

    def _remove_drafts(self) -> None:
        """Those of servers that were killed while they wrote; another server's that is writing now is left alone."""
        for draft in self.path.glob(f"{_DRAFT_PREFIX}*"):
            with contextlib.suppress(OSError):
                if time.time() - draft.stat().st_mtime > _DRAFT_AGE_MAX_S:
                    draft.unlink()


def snapshot_names(folder: Path) -> list[str]:
    """Names of the snapshots in ``folder``, the oldest first; empty if there is no such folder."""
    try:
        return sorted(name for name in os.listdir(folder) if _NAME.fullmatch(name))
    except FileNotFoundError:
        return []


def _next_name(kind: str, present: list[str]) -> str:
    """A name of now that sorts behind ``present``, also within one millisecond and when the clock was set back."""
    now = datetime.now()
    moment = f"{now:%Y%m%d%H%M%S}{now.microsecond // 1000:03d}"
    if present and moment <= present[-1][:17]:
        moment = f"{int(present[-1][:17]) + 1:017d}"
    return f"{moment}-{kind}.cfg"


def format_snapshot(config: Config, models: JsonObject, name: str) -> str:
    """The text of a snapshot: every effective setting but the secret ones, and the models."""
    values = {}
    for key in KINDS:
        value = getattr(config, key)
        if key not in _LEFT_OUT and value not in (None, "", {}):
            # A URL may be signed, in its query.
            values[key] = without_secrets(_text(value)) if key == "load_models" else _text(value)
    snapshot = {"name": name, "modelCount": len(models), "created": time.time_ns() // 1_000_000, "models": models}
    values["model_snapshot"] = json.dumps(snapshot)
    file = _config_file(config)
    if file:
        values["tsConfigFile"] = file
    values["version"] = __version__
    return format_properties(values, f"Saved by pyserve {__version__}\n{datetime.now().astimezone():%c %Z}")


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _config_file(config: Config) -> str:
    """The config.properties that the server was started with, as far as any of its settings counts."""
    for place in config.origin.values():
        file, colon, line = place.rpartition(":")
        if colon and line.isdigit():
            return os.path.abspath(file)
    return ""


def read_snapshot(path: Path, store: str | None) -> list[SavedModel]:
    """The models of a snapshot that a server wrote.

    Raises:
        SnapshotError: it is damaged; the text says how.
    """
    try:
        with open(open_regular(path), "rb") as file:
            content = file.read(SNAPSHOT_SIZE_MAX + 1)
        if len(content) > SNAPSHOT_SIZE_MAX:
            raise SnapshotError(f"it is larger than {SNAPSHOT_SIZE_MAX} bytes")
        values = {entry.key: entry.value for entry in parse_properties(content.decode("latin-1"))}
        if "model_snapshot" not in values:
            raise SnapshotError("it has no model_snapshot")
        snapshot = json.loads(values["model_snapshot"])
        if not isinstance(snapshot, dict):
            raise SnapshotError("its model_snapshot is not a JSON object")
        models = saved_models(snapshot, store)
        check_complete(snapshot, models)
    except OSError as error:
        raise SnapshotError(error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:
        raise SnapshotError(str(error)) from None
    return models


def models_to_restore(config: Config, folder: Path) -> list[SavedModel] | None:
    """What is to be served instead of ``load_models``: the newest whole snapshot's models if ``restore`` is set, else
    those of ``model_snapshot`` in the configuration; None if there is neither. ``compat=strict`` restores unasked, as
    TorchServe does, unless a configuration was named.

    Raises:
        SnapshotError: ``model_snapshot`` in the configuration is not of the right form.
    """
    unasked = config.compat == "strict" and not config.no_config_snapshots and _config_file(config) in (
        "", os.path.abspath(CONFIG_FILE_DEFAULT)
    )  # fmt: skip
    if config.restore or unasked:
        models = _newest(folder, config.model_store)
        if models is not None:
            return models
        if config.restore:
            log.warning("nothing is restored: there is no snapshot in %s that can be used", folder)
    if not config.model_snapshot:
        return None
    return saved_models(config.model_snapshot, config.model_store)


def _newest(folder: Path, store: str | None) -> list[SavedModel] | None:
    try:
        names = snapshot_names(folder)
    except OSError as error:
        log.warning("%s cannot be read: %s", folder, error.strerror)
        return None
    for name in reversed(names):
        try:
            models = read_snapshot(folder / name, store)
        except SnapshotError as error:
            log.warning("the snapshot %s cannot be used: %s; trying the one before", folder / name, error)
            continue
        log.info("restoring %d models from %s; --models and load_models are not used", len(models), folder / name)
        return models
    return None
