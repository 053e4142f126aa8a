"""What is served, written down before a change is answered: for the next server process, and for the next start.

The state is for a server that takes over from one that crashed, within one ``pyserve start``; it has everything.
The snapshots are for another start; they have what TorchServe's have.

What cannot be written takes no change back: it is made, and its answer says what could not be kept, and why
(`StateKeeper.problem`). The next change writes everything again.

Loop thread only; the files are written in a thread, one change after the other.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyserve.archive.given import given_for
from pyserve.errors import JsonObject
from pyserve.models.snapshot import CHANGE, SnapshotFolder
from pyserve.models.snapshot_models import snapshot_entry
from pyserve.os_errors import cause_of

if TYPE_CHECKING:
    from pyserve.models.model import Model

log = logging.getLogger(__name__)

STATE_NAME = "runtime-state.json"


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
    """The content of the state."""
    return {
        "models": [
            {
                "path": str(model.archive.path),
                "name": model.name,
                "version": model.version,
                "content": model.archive.sha256,
                "url": model.url,
                "handler": model.handler_name,
                "loaded_at_startup": model.loaded_at_startup,
                "workers": model.wanted_workers,
                "settings": asdict(model.settings),
                "endless": model.endless,
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
                "given": given_for(path).to_text() or None,
            },
        )
    for failure in failures:
        if failure.entry is not None:
            named.setdefault(failure.name, {}).setdefault(failure.version, failure.entry)
    return named


class StateKeeper:
    """Writes what is served. A write covers all changes made before it begins, so that many at once share one.

    Args:
        keep_state: keeps the state for the next server, and returns why it has no copy in a file, or ``""``; raises
            OSError when it cannot keep it at all. Called in a thread. None keeps none.
        snapshots: None for none.
        capture: gives the state and the snapshot's models; called on the loop.

    Attributes:
        problem: what of the last write could not be kept, and why, as a sentence; ``""`` if all was.
    """

    def __init__(
        self, keep_state: Callable[[bytes], str] | None, snapshots: SnapshotFolder | None,
        capture: Callable[[], tuple[JsonObject, JsonObject]],
    ):  # fmt: skip
        self.problem = ""
        self._keep_state = keep_state
        self._snapshots = snapshots
        self._capture = capture
        self._wanted = self._kept = 0  # changes, counted
        self._kind = CHANGE
        self._writing: asyncio.Task[None] | None = None

    async def save(self, kind: str = CHANGE) -> None:
        """Returns when what is served now has been written, or could not be; see ``problem``.

        Args:
            kind: of the snapshot.
        """
        self._wanted += 1
        mine = self._wanted
        if kind != CHANGE:
            self._kind = kind
        while self._kept < mine:
            if self._writing is None:
                self._writing = asyncio.get_running_loop().create_task(self._write())
            # Whoever waits may give up; the write goes on, and the next one begins after it.
            await asyncio.shield(self._writing)

    async def _write(self) -> None:
        covered = self._wanted
        kind, self._kind = self._kind, CHANGE
        try:
            state, models = self._capture()
            self.problem = await asyncio.to_thread(self._write_all, kind, state, models)
            self._kept = covered
        finally:
            self._writing = None

    def _write_all(self, kind: str, state: JsonObject, models: JsonObject) -> str:
        problems = []
        if self._keep_state is not None:
            problems.append(self._try_keep_state(self._keep_state, state))
        if self._snapshots is not None:
            problems.append(self._snapshots.write(kind, models))
        return " ".join(filter(None, problems))

    def _try_keep_state(self, keep: Callable[[bytes], str], state: JsonObject) -> str:
        content = json.dumps(state).encode()
        try:
            why = keep(content)
            return f"What is served is kept in memory only: {why}." if why else ""
        except OSError as error:
            problem = f"What is served could not be kept for a restart after a crash: {cause_of(error)}."
            log.error("%s", problem)
            return problem


def read_state(content: bytes | None) -> dict[str, Any] | None:
    """What a server process kept; None if it never got as far as serving."""
    try:
        state: dict[str, Any] = json.loads(content or b"")
    except ValueError:
        return None
    return state
