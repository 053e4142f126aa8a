"""What is served, written down before a change is answered: for the next server process, and for the next start.

The state file is for a server that takes over from one that crashed, within one ``pyserve start``; it has everything.
The snapshots are for another start; they have what TorchServe's have.

Loop thread only; the files are written in a thread, one change after the other.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyserve.errors import JsonObject
from pyserve.models.snapshot import CHANGE, SnapshotFolder, write_durably
from pyserve.models.snapshot_models import snapshot_entry

if TYPE_CHECKING:
    from pyserve.models.model import Model


@dataclass
class LoadFailure:
    """An archive that could not even be opened; there is no model of it.

    Attributes:
        version, entry: what a snapshot said of it, so that the next one says so too; ``""`` and None if none did.
    """

    name: str
    url: str
    error: str
    version: str = ""
    entry: JsonObject | None = None


def state_of(models: Iterable[Model], defaults: Mapping[str, str], failures: Iterable[LoadFailure]) -> JsonObject:
    """The content of the state file."""
    return {
        "models": [
            {
                "path": str(model.archive.path),
                "name": model.name,
                "version": model.version,
                "url": model.url,
                "handler": model.handler_name,
                "loaded_at_startup": model.loaded_at_startup,
                "workers": model.wanted_workers,
                "settings": asdict(model.settings),
            }
            for model in models
        ],
        "defaults": dict(defaults),
        "failures": [asdict(failure) for failure in failures],
    }


def snapshot_of(
    models: Iterable[Model], defaults: Mapping[str, str], failures: Iterable[LoadFailure], store: str | None
) -> JsonObject:
    """Name to version to settings, as in `pyserve.models.snapshot_models`."""
    named: dict[str, dict[str, JsonObject]] = {}
    for model in models:
        path = Path(model.archive.path)
        is_in_store = store is not None and path.parent == Path(store)
        named.setdefault(model.name, {})[model.version] = snapshot_entry(
            asdict(model.settings),
            is_default=defaults.get(model.name) == model.version,
            file=path.name,
            runtime=model.runtime,
            workers=model.wanted_workers,
            parallel_level=model.archive.config.parallel_level or 0,
            others={
                "handler": model.handler_name,
                "url": model.url if model.url != path.name else None,
                "archive": None if is_in_store else str(path.absolute()),
            },
        )
    for failure in failures:
        if failure.entry is not None:
            named.setdefault(failure.name, {}).setdefault(failure.version, failure.entry)
    return named


class StateKeeper:
    """Writes what is served. A write covers all changes made before it begins, so that many at once share one.

    Args:
        state_file, snapshots: None for what is not kept.
        capture: gives the state file's content and the snapshot's models; called on the loop.
    """

    def __init__(
        self, state_file: Path | None, snapshots: SnapshotFolder | None,
        capture: Callable[[], tuple[JsonObject, JsonObject]],
    ):  # fmt: skip
        self._state_file = state_file
        self._snapshots = snapshots
        self._capture = capture
        self._wanted = self._kept = 0  # changes, counted
        self._kind = CHANGE
        self._writing: asyncio.Task[tuple[int, Exception | None]] | None = None

    async def save(self, kind: str = CHANGE) -> None:
        """Returns when what is served now has been written.

        Args:
            kind: of the snapshot.

        Raises:
            OSError: the state file cannot be written. That a snapshot cannot is only warned of.
        """
        self._wanted += 1
        mine = self._wanted
        if kind != CHANGE:
            self._kind = kind
        while self._kept < mine:
            if self._writing is None:
                self._writing = asyncio.get_running_loop().create_task(self._write())
            # Whoever waits may give up; the write goes on, and the next one begins after it.
            covered, error = await asyncio.shield(self._writing)
            if error is not None and mine <= covered:
                raise error

    async def _write(self) -> tuple[int, Exception | None]:
        """How many changes are covered, and why they could not be written."""
        covered = self._wanted
        kind, self._kind = self._kind, CHANGE
        try:
            state, models = self._capture()
            await asyncio.to_thread(self._write_files, kind, state, models)
        except Exception as error:
            return covered, error
        else:
            self._kept = covered
            return covered, None
        finally:
            self._writing = None

    def _write_files(self, kind: str, state: JsonObject, models: JsonObject) -> None:
        if self._state_file is not None:
            write_durably(self._state_file, json.dumps(state).encode(), draft_prefix=".state-")
        if self._snapshots is not None:
            self._snapshots.write(kind, models)


def read_state(path: Path) -> dict[str, Any] | None:
    """What a server process wrote to the state file; None if it never got as far as serving."""
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return state
