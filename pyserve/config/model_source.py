"""Which archives a server is asked to load: ``--models`` and ``load_models`` resolved against the model store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pyserve.config.archive_url import is_url, without_secrets

ARCHIVE_SUFFIXES = (".mar", ".model", ".tar.gz", ".tgz")


class ModelSource(NamedTuple):
    """One model to load.

    Attributes:
        name: the name it is to be served under; ``None`` leaves that to its manifest.
        path_or_file: absolute path of an archive or folder, or the URL of an archive.
        url: where the archive at that path was fetched from; ``None`` if it was not.
    """

    name: str | None
    path_or_file: str
    url: str | None = None

    @property
    def shown(self) -> str:
        """What answers call the archive: its URL or the name of its file."""
        if is_url(self.path_or_file):  # it could not be fetched
            return without_secrets(self.path_or_file)
        return self.url or Path(self.path_or_file).name

    @property
    def exists(self) -> bool:
        """Whether there is such a file or folder; ``False`` for URLs."""
        return os.path.exists(self.path_or_file)


def list_store(store: str | None) -> list[str]:
    """Names of the archives and folders in ``store`` that are not hidden, sorted; empty without a store."""
    if store is None:
        return []
    with os.scandir(store) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and (entry.is_dir() or (entry.is_file() and entry.name.endswith(ARCHIVE_SUFFIXES)))
        )


def resolve_models(wanted: str, store: str | None) -> list[ModelSource]:
    """Resolve a comma-joined list of ``all``, ``item`` and ``name=item``, repeated items once.

    An item is a name in the store, a path (absolute, or relative to the current folder), or a URL. An item
    that does not exist is kept: the server reports it beside the others instead of not starting.

    Raises:
        ValueError: ``=item`` without a name or ``name=`` without an item.
    """
    sources: dict[ModelSource, None] = {}
    for part in (piece.strip() for piece in wanted.split(",")):
        if not part:
            continue
        if part.lower() == "all":
            for file in list_store(store):
                sources[ModelSource(None, os.path.join(store or "", file))] = None
            continue
        name, equals, item = part.partition("=")
        if not equals or is_url(name):  # the equals sign of a query
            sources[ModelSource(None, _locate(part, store))] = None
        elif not name.strip() or not item.strip():
            raise ValueError(f"cannot read the model {part!r}; write archive.mar or name=archive.mar")
        else:
            sources[ModelSource(name.strip(), _locate(item.strip(), store))] = None
    return list(sources)


def _locate(item: str, store: str | None) -> str:
    if is_url(item):
        return item
    here = Path(item).expanduser().absolute()
    if store is None:
        return str(here)
    in_store = Path(store, item)
    # A bare name means the store, as everywhere in TorchServe; a path means a path.
    candidates = (in_store, here) if os.sep not in item else (here, in_store)
    return str(next((path for path in candidates if path.exists()), candidates[0]))
