"""The archives of a cluster where its control is: taken from whoever brings one, and given to each node once.

Parts travel through the object store of the cluster, whose nodes hand them on to each other; its copies go a while
after the last node has asked. When the control comes back on another node, a replica's node gives it what it lacks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any

from pyserve.errors import ModelLoadError
from pyserve.replicas.archives import Draft, NodeArchives

SHARED_S = 20.0
GIVEN_TIMEOUT_S = 120.0
# Who was asked for an archive and does not begin has not got it, or has gone: another one is asked. So it is if one
# that has begun sends no further part.
BEGUN_S = 10.0
STALLED_S = 30.0
# What nobody has sent more of for so long is given up.
ABANDONED_S = 3600.0

# SHA-256 and the file's name.
Key = tuple[str, str]


class Stock:
    """Event loop only.

    Args:
        archives: of this node.
        share: puts bytes where all nodes get them; what comes of it is what replicas are given. Blocks.
        shared_s: how long that is kept for the next node that asks.
    """

    def __init__(
        self, archives: NodeArchives, share: Callable[[bytes], Any], shared_s: float = SHARED_S,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self._archives = archives
        self._share = share
        self._shared_s = shared_s
        self._clock = clock
        self._shared: dict[tuple[str, int], asyncio.Future[Any]] = {}
        self._drafts: dict[Key, Draft] = {}
        self._turns: dict[Key, asyncio.Lock] = {}  # parts come one after the other, whoever sends them
        self._wanted: set[Key] = set()
        self._heard_at: dict[Key, float] = {}  # somebody was asked for it, or has sent a part of it
        self._arrived = asyncio.Event()
        self.sent: dict[str, dict[str, int]] = {}

    async def has(self, sha256: str, file: str) -> bool:
        return await asyncio.to_thread(self._archives.has, sha256, file)

    # --- from a node ----------------------------------------------------------------------------------------------

    def want(self, sha256: str, file: str) -> None:
        """Asks replicas for an archive, unless it is here."""
        if not self._archives.has(sha256, file):
            self._wanted.add((sha256, file))

    def wanted_of_one(self) -> list[Key]:
        """What the replica that asks is to give; nobody else is asked for it meanwhile."""
        now = self._clock()
        found = [key for key in self._wanted if self._is_silent(key, STALLED_S if key in self._drafts else BEGUN_S)]
        self._heard_at |= dict.fromkeys(found, now)
        return found

    def _is_silent(self, key: Key, limit_s: float) -> bool:
        return self._clock() - self._heard_at.get(key, -limit_s) >= limit_s

    async def receive(self, sha256: str, file: str, size: int, offset: int, data: bytes) -> None:
        """A part of an archive; in order, the last one completes it.

        Several may send it at the same time, or begin again: what one has sent is not taken again from another.

        Raises:
            ServeError: there is no room, or it is not what it should be.
        """
        key = sha256, file
        self._heard_at[key] = self._clock()
        async with self._turns.setdefault(key, asyncio.Lock()):
            draft = self._drafts.get(key)
            if draft is None:
                if await self.has(sha256, file):
                    return
                if offset == 0:
                    draft = self._drafts[key] = await asyncio.to_thread(self._archives.draft, sha256, file, size)
            if draft is None or offset > draft.size:
                raise ModelLoadError(f"{file}: a part of it is missing; send it again")
            try:
                await asyncio.to_thread(draft.write, data[draft.size - offset :])
                if draft.size < size:
                    return
                await asyncio.to_thread(draft.commit)
            except BaseException:
                self._give_up(key)
                raise
            self._give_up(key)
        self._turns.pop(key, None)
        self._heard_at.pop(key, None)
        self._wanted.discard(key)
        self._arrived.set()
        self._arrived = asyncio.Event()

    def _give_up(self, key: Key) -> None:
        self._drafts.pop(key).close()

    # --- to the nodes ---------------------------------------------------------------------------------------------

    async def part(self, sha256: str, file: str, offset: int, node: str) -> Any:
        """What was made of the bytes from ``offset`` on, at most CHUNK_SIZE; of none at its end.

        Raises:
            ModelLoadError: no node has it any more.
        """
        await self._wait_for(sha256, file)
        key = sha256, offset
        shared = self._shared.get(key)
        if shared is None:
            loop = asyncio.get_running_loop()
            shared = self._shared[key] = asyncio.ensure_future(asyncio.to_thread(self._read, sha256, file, offset))
            loop.call_later(self._shared_s, self._shared.pop, key, None)
        size, value = await asyncio.shield(shared)
        counts = self.sent.setdefault(sha256, {})
        counts[node] = counts.get(node, 0) + size
        return value

    def _read(self, sha256: str, file: str, offset: int) -> tuple[int, Any]:
        data = self._archives.read(sha256, file, offset)
        return len(data), self._share(data)

    async def _wait_for(self, sha256: str, file: str) -> None:
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + GIVEN_TIMEOUT_S
        while True:
            arrived = self._arrived  # before it is looked for: what arrives meanwhile is not missed
            if await self.has(sha256, file):
                return
            try:
                await asyncio.wait_for(arrived.wait(), ends_at - loop.time())
            except asyncio.TimeoutError:
                raise ModelLoadError(
                    f"{file}: no node has it any more; deploy it again, from a URL to have it outlive its nodes"
                ) from None

    def forget(self, kept: Collection[str]) -> None:
        """Removes from this node, in a while, what is not among ``kept``."""
        self.sent = {sha256: counts for sha256, counts in self.sent.items() if sha256 in kept}
        for key in [key for key in self._drafts if self._is_silent(key, ABANDONED_S)]:
            self._give_up(key)
        task = asyncio.ensure_future(asyncio.to_thread(self._archives.remove_others, kept))
        task.add_done_callback(lambda _: None)
