"""The archives of a replica: from the node they are on, from a URL, or from the control; to each node once."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from pyserve.archive.file_digest import digest_of
from pyserve.config.config import Config
from pyserve.errors import ModelLoadError
from pyserve.fetch.sources import ArchiveSources
from pyserve.replicas.archives import NodeArchives, part_of
from pyserve.replicas.link import RETRY_S, Link, LinkError
from pyserve.replicas.state import Entry, State


class Delivery:
    """Loop of the engine only.

    Args:
        node: that parts are counted for.
    """

    def __init__(self, link: Link, archives: NodeArchives, node: str):
        self._link = link
        self._archives = archives
        self._node = node
        # One at a time: whoever waits for another process of this node holds a thread, and that one needs threads.
        self._turn = asyncio.Lock()

    async def brought(self, entry: Entry, config: Config) -> Path:
        """Where the archive of ``entry`` lies on this node, by now.

        Raises:
            ServeError: it cannot be had.
        """
        async with self._turn:
            return await self._brought(entry, config)

    async def _brought(self, entry: Entry, config: Config) -> Path:
        if entry.url:
            return await self._fetched(entry, config)
        if entry.sha256:
            return await self._sent(entry)
        path = Path(entry.path)
        if not await asyncio.to_thread(path.exists):
            raise ModelLoadError(f"{entry.path} is not on this node; give a path that every node has, or a URL")
        return path

    async def _sent(self, entry: Entry) -> Path:
        path = self._archives.path(entry.sha256, entry.file)
        async with self._locked(entry.sha256):
            if await asyncio.to_thread(path.is_file):
                await asyncio.to_thread(os.utime, path.parent)  # as if it had come now: it is not to be removed
                return path
            draft = await asyncio.to_thread(self._archives.draft, entry.sha256, entry.file, entry.size)
            try:
                while data := await self._part(entry, draft.size):
                    await asyncio.to_thread(draft.write, data)
                return await asyncio.to_thread(draft.commit)
            finally:
                draft.close()

    async def _part(self, entry: Entry, offset: int) -> bytes:
        while True:
            try:
                shared = await self._link.call("part", entry.sha256, entry.file, offset, self._node)
                return await self._link.taken(shared)
            except LinkError:  # the next control has to be given the archive itself
                await asyncio.sleep(RETRY_S)

    async def _fetched(self, entry: Entry, config: Config) -> Path:
        key = entry.archive_key
        folder = self._archives.folder(key)
        async with self._locked(key):
            await asyncio.to_thread(folder.mkdir, 0o700, True, True)
            sources = ArchiveSources(replace(config, model_store=str(folder)))
            path = (await sources.obtain(entry.url, reuses=True)).path
            if entry.sha256 and await asyncio.to_thread(digest_of, path) != entry.sha256:
                await asyncio.to_thread(path.unlink, True)
                raise ModelLoadError(f"{entry.file}: its URL has another archive by now than when it was deployed")
        return path

    @contextlib.asynccontextmanager
    async def _locked(self, key: str) -> AsyncIterator[None]:
        lock = self._archives.lock(key)
        await asyncio.to_thread(lock.__enter__)
        try:
            yield
        finally:
            lock.__exit__(None, None, None)

    async def give(self, sha256: str, file: str) -> None:
        """Gives the control an archive that this node has, if it has it.

        Raises:
            LinkError, ServeError: it was not taken.
        """
        path = self._archives.path(sha256, file)
        if not await asyncio.to_thread(path.is_file):
            return
        await self.send(path, sha256, file)

    async def send(self, path: Path, sha256: str, file: str) -> None:
        """Gives the control a file.

        Raises:
            LinkError, ServeError: it was not taken.
        """
        size, offset = (await asyncio.to_thread(path.stat)).st_size, 0
        while offset < size:
            data = await asyncio.to_thread(part_of, path, offset)
            await self._link.call("receive", sha256, file, size, offset, data)
            offset += len(data)

    async def remove_others(self, state: State) -> None:
        """Removes, in a while, what is not of ``state``."""
        kept = {entry.archive_key for entry in state.entries}
        await asyncio.to_thread(self._archives.remove_others, kept)
