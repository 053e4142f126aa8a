"""Reloads certificates and keys when their files change."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Callable
from pathlib import Path

from pyserve.config.config import Config
from pyserve.errors import ConfigError
from pyserve.security import tls
from pyserve.security.tokens import Tokens

log = logging.getLogger(__name__)

INTERVAL_S = 5.0

Stamp = tuple[tuple[int, int, int], ...]


class Watched:
    """Files that are read together, and what reads them again.

    Attributes:
        files: their paths.
        renew: raises ConfigError if they cannot be used as they are; then all stays as it was.
    """

    def __init__(self, files: list[Path], renew: Callable[[], None]):
        self.files = files
        self.renew = renew
        self._stamp = stamp_of(files)

    def look(self) -> bool:
        """Reads them again if they have changed, and returns whether that was done. Touches the disk."""
        stamp = stamp_of(self.files)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        names = ", ".join(map(str, self.files))
        try:
            self.renew()
        except ConfigError as error:
            log.error("changed, but cannot be used, so that what was read before stays: %s: %s", names, error)
            return False
        log.info("read again, because it changed: %s", names)
        return True


def watched(config: Config, context: ssl.SSLContext | None, tokens: Tokens | None) -> list[Watched]:
    """What a server has to look at."""
    found = []
    if context is not None and tls.files(config):
        found.append(Watched(tls.files(config), lambda: tls.renew(context, config)))
    if tokens is not None and config.token_file:
        found.append(Watched([tokens.file], tokens.reload))
    return found


async def keep_renewed(all_watched: list[Watched], interval_s: float = INTERVAL_S) -> None:
    """Looks again and again; until cancelled."""
    while all_watched:
        await asyncio.sleep(interval_s)
        for each in all_watched:
            await asyncio.to_thread(each.look)


def stamp_of(files: list[Path]) -> Stamp:
    """Differs when a file was written or replaced, also behind a link; one that is not there counts as zeros."""
    stamps = []
    for path in files:
        try:
            status = os.stat(path)
        except OSError:
            stamps.append((0, 0, 0))
        else:
            stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(stamps)
