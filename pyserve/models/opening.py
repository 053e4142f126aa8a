"""Archives that are opened for a model, whatever they are."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from pyserve.archive.archive import Archive, open_archive
from pyserve.errors import ModelLoadError, ServeError

log = logging.getLogger(__name__)


async def taken(archives: dict[str, Archive | ServeError], path: str) -> Archive | ServeError:
    """The archive that was opened before; for a second model of the same file one of its own, to close by itself."""
    found = archives.get(path)
    if isinstance(found, Archive):
        del archives[path]
    return await opened_now(path) if found is None else found


async def opened_now(path: str) -> Archive | ServeError:
    """The archive, or why it cannot be."""
    try:
        return await asyncio.to_thread(open_archive, path)
    except ServeError as error:
        return error
    except Exception as error:  # one archive, whatever it is, does not keep the others from being served
        log.exception("%s cannot be opened", Path(path).name)
        return ModelLoadError(f"{Path(path).name}: cannot be opened: {type(error).__name__}: {error}")
