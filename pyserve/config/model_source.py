"""Which archives a server is asked to load: ``--models`` and ``load_models`` resolved against the model store."""

from __future__ import annotations

import difflib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pyserve.config.archive_url import is_url, without_secrets

ARCHIVE_SUFFIXES = (".mar", ".model", ".tar.gz", ".tgz")
# Of one path, in a list that is joined by commas.
_COMMAS_MAX = 4


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


def nearest_file(name: str, files: Iterable[str]) -> str:
    """The one of ``files`` that ``name`` most likely means: with an ending forgotten, or misspelt; ``""`` if none."""
    files = list(files)
    for suffix in ARCHIVE_SUFFIXES:
        if name + suffix in files:
            return name + suffix
    near = difflib.get_close_matches(name, files, n=1, cutoff=0.8)
    if near:
        return near[0]
    stems = {file.partition(".")[0]: file for file in reversed(files)}
    near = difflib.get_close_matches(name.partition(".")[0], stems, n=1, cutoff=0.7)
    return stems[near[0]] if near else ""


def list_store(store: str | None) -> list[str]:
    """Names of the archives and folders in ``store`` that are not hidden, sorted; empty without a store, or without
    one that can be read.

    What cannot be loaded whatever is done with it is passed over: links that lead nowhere, pipes, sockets, and names
    that are no text. `store_problems` names those.
    """
    return sorted(name for name, problem in _store_entries(store) if not problem)


def store_problems(store: str | None) -> list[str]:
    """``name: why`` of each entry of ``store`` that looks like an archive and cannot be one, sorted."""
    return sorted(f"{_printable(name)}: {problem}" for name, problem in _store_entries(store) if problem)


def _store_entries(store: str | None) -> Iterator[tuple[str, str]]:
    """Name of each archive and folder, and why it cannot be loaded; ``""`` if it can be tried."""
    if store is None:
        return
    try:
        names = os.listdir(store)
    except OSError as error:
        yield os.path.basename(store), f"it cannot be listed: {error.strerror}"
        return
    for name in names:
        if name.startswith("."):
            continue
        try:
            mode = os.stat(os.path.join(store, name)).st_mode
        except OSError as error:
            # One that went while they were listed is no entry any more.
            if name.endswith(ARCHIVE_SUFFIXES) and os.path.lexists(os.path.join(store, name)):
                yield name, _why(error)
            continue
        is_archive = name.endswith(ARCHIVE_SUFFIXES)
        if is_archive and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            yield name, "it is neither a file nor a folder"
        elif is_archive or stat.S_ISDIR(mode):
            yield name, "" if _is_utf8(name) else "its name is not UTF-8"


def _why(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "it is a link that leads in a circle"
    if error.errno == errno.ENOENT:
        return "it is a link to a file that is not there"
    return error.strerror or str(error)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(name: str) -> str:
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def resolve_models(wanted: str, store: str | None) -> list[ModelSource]:
    """Resolve a comma-joined list of ``all``, ``item`` and ``name=item``, repeated items once.

    An item is a name in the store, a path (absolute, or relative to the current folder), or a URL. An item
    that does not exist is kept: the server reports it beside the others instead of not starting. Commas and equals
    signs belong to a path if that is where something is, and they would say nothing that is there otherwise.

    Raises:
        ValueError: ``=item`` without a name or ``name=`` without an item.
    """
    sources: dict[ModelSource, None] = {}
    for part in _parts(wanted, store):
        if part.lower() == "all":
            for file in list_store(store):
                sources[ModelSource(None, os.path.join(store or "", file))] = None
            continue
        name, equals, item = part.partition("=")
        if not equals or is_url(name) or _is_path_with_equals(part, item, store):  # or it is that of a query
            sources[ModelSource(None, _locate(part, store))] = None
        elif not name.strip() or not item.strip():
            raise ValueError(f"cannot read the model {part!r}; write archive.mar or name=archive.mar")
        else:
            sources[ModelSource(name.strip(), _locate(item.strip(), store))] = None
    return list(sources)


def _parts(wanted: str, store: str | None) -> Iterator[str]:
    """What stands between commas, blank parts left out; as one where only both sides of a comma are a path."""
    pieces = [piece.strip() for piece in wanted.split(",")]
    at = 0
    while at < len(pieces):
        count = 1
        if pieces[at] and pieces[at].lower() != "all" and not _is_there([pieces[at]], store):
            longer = range(2, min(_COMMAS_MAX + 1, len(pieces) - at) + 1)
            count = next((number for number in longer if _is_there(pieces[at : at + number], store)), 1)
        if part := ",".join(pieces[at : at + count]):
            yield part
        at += count


def _is_there(pieces: list[str], store: str | None) -> bool:
    """Whether these, joined by commas, lead to something: a path, or a name and a path. URLs do."""
    joined = ",".join(pieces)
    items = [joined, joined.partition("=")[2]] if "=" in pieces[0] else [joined]
    return any(is_url(item) or (item and os.path.exists(_locate(item, store))) for item in items)


def _is_path_with_equals(part: str, item: str, store: str | None) -> bool:
    return os.path.exists(_locate(part, store)) and not (item.strip() and os.path.exists(_locate(item.strip(), store)))


def _locate(item: str, store: str | None) -> str:
    if is_url(item):
        return item
    here = Path(item).expanduser().absolute()
    if store is None:
        return str(here)
    in_store = Path(store, item)
    # A bare name means the store, as everywhere in TorchServe; a path means a path.
    candidates = (in_store, here) if os.sep not in item else (here, in_store)
    return str(next((path for path in candidates if os.path.exists(path)), candidates[0]))
