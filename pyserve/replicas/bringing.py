"""Archives on their way from a command to the control of a cluster."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyserve.archive.archive import survey
from pyserve.archive.file_digest import digest_of
from pyserve.archive.manifest import check_model_name
from pyserve.config.archive_url import is_url, without_secrets
from pyserve.config.model_source import ARCHIVE_SUFFIXES
from pyserve.embedding.settings import engine_config
from pyserve.errors import InvalidModelError, ModelLoadError, ServeError
from pyserve.fetch.sources import ArchiveSources
from pyserve.os_errors import cause_of
from pyserve.replicas.archives import CHUNK_SIZE
from pyserve.replicas.state import Entry


def looked_at(
    path_or_url: str, name: str | None = None, config: Mapping[str, Any] | None = None
) -> tuple[Entry, Path | None]:
    """What an archive is to be served as, and its file, if that is to be brought: a URL each node fetches for itself.

    Args:
        name: in place of the manifest's.
        config: keys of config.properties; of a URL how it is fetched.

    Raises:
        ServeError: it cannot be read, or cannot go to a cluster.
    """
    if is_url(path_or_url):
        return _fetched(path_or_url, name, config or {}), None
    path = Path(path_or_url)
    return _entry(path, name), path


def _entry(path: Path, name: str | None) -> Entry:
    if path.is_dir() or not path.name.endswith(ARCHIVE_SUFFIXES):
        kind = "a folder" if path.is_dir() else "no archive"
        if path.exists():
            raise InvalidModelError(f"{path} is {kind}, and nodes are sent archives; pack it with `pyserve archive`")
    try:
        with survey(path) as found:
            name = name or found.manifest.model_name
            check_model_name(name)
            version = found.manifest.model_version
        return Entry(name, version, path.name, sha256=digest_of(path), size=path.stat().st_size)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {cause_of(error)}") from None


def _fetched(url: str, name: str | None, config: Mapping[str, Any]) -> Entry:
    """Looks at what a URL has. It is fetched for that alone."""
    allowed = dict(config)
    allowed["allowed_urls"] = ",".join(filter(None, [str(config.get("allowed_urls", "")), _pattern(url)]))
    with tempfile.TemporaryDirectory(prefix="pyserve-look-") as folder:
        sources = ArchiveSources(replace(engine_config(allowed, None), model_store=folder))
        try:
            path = asyncio.run(sources.obtain(url)).path
        except ServeError as error:
            raise type(error)(f"{without_secrets(url)}: {error.reason()}") from None
        return replace(_entry(path, name), url=url)


def _pattern(url: str) -> str:
    """Of whoever names a URL on a command line, that one is wanted; the nodes have patterns of their own."""
    return "".join(
        f"\\{each}" if not each.isalnum() and each not in "-_/:%" else each for each in url.partition("?")[0]
    )


def bring(entry: Entry, path: Path, control: Any, get: Any) -> None:
    """Sends a file, unless the control has it already. Blocks.

    Args:
        control: the actor.
        get: waits for what it returns.

    Raises:
        ServeError: it was not taken, or changed meanwhile.
    """
    if get(control.has.remote(entry.sha256, entry.file)):
        return
    offset = 0
    try:
        with path.open("rb") as file:
            while data := file.read(CHUNK_SIZE):
                get(control.receive.remote(entry.sha256, entry.file, entry.size, offset, data))
                offset += len(data)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {cause_of(error)}") from None
    if offset != entry.size:
        raise ModelLoadError(f"{path} was changed while it was sent; send it again")
