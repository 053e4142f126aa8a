"""The engine's side of all front ends: takes their links, and tells them what the server is about to do."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.metrics_core import Metric

from pyserve.errors import ConfigError
from pyserve.fronts import wire
from pyserve.fronts.channel import Channel, LinkFiles
from pyserve.fronts.counts import front_end_families
from pyserve.fronts.link import App, Link
from pyserve.fronts.meeting import Meeting
from pyserve.fronts.shared_budget import LOOK_S, LedgerFile, SharedBudget
from pyserve.fronts.shares import Shares
from pyserve.fronts.tensors import Tensors
from pyserve.request.messages import ErrorFormat

log = logging.getLogger(__name__)

# Until all front ends let clients in. They have loaded long before the models have, mostly.
LISTENING_S = 60.0
HELLO_S = 5.0
_LOOK_S = 0.05
# Looks in a row that find a front end with more of the budget than it can use, while others have none.
_KEEPING_MAX = 20
_PENDING_MAX = 64
_CREDENTIALS = struct.Struct("3i")


class Gate:
    """Loop thread only.

    Args:
        count: of front ends.
        budget: of the bytes that bodies grow by in this process; it counts with those of front ends.

    Attributes:
        tensors: what front ends may send as tensors; None if nothing.
        refused: answers that front ends gave themselves, without asking the engine, counted by status.
    """

    def __init__(self, meeting: Meeting, count: int, shares: Shares, budget: SharedBudget, error_format: ErrorFormat):
        self.refused: Counter[int] = Counter()
        self.tensors: Tensors | None = None
        self._loop = asyncio.get_running_loop()
        self._meeting = meeting
        self._count = count
        self._shares = shares
        self._budget = budget
        self._ledger_file = LedgerFile(count + 1, budget.size_max)
        self._ledger = self._ledger_file.of(count)
        budget.attach(self._ledger)
        self._looking = self._loop.call_later(LOOK_S, self._look)
        self._error_format = error_format
        self._apps: Sequence[App] = ()
        self._links: dict[int, Link] = {}
        self._started = [0] * count  # links of each front end so far
        self._requests = [0] * count  # of links that are gone
        self._tensors = [0] * count
        self._natives = [0] * count
        self._pending: dict[socket.socket, asyncio.TimerHandle] = {}
        self._told: list[int] = [wire.OPEN]  # what one that comes has to know
        self._changed = asyncio.Event()

    async def open(self, apps: Sequence[App]) -> None:
        """Lets front ends in, and has them let their clients in; returns when all of them do.

        One that does not come, which hangs perhaps, does not keep the others from serving: after LISTENING_S that is
        logged, and those that do are enough.

        Args:
            apps: of the listeners, in the order that `listening.grouped` gives.

        Raises:
            ConfigError: none of them comes.
        """
        self._apps = apps
        if self.tensors is not None:
            self.tensors.start(self.send_table)
        self._loop.add_reader(self._meeting.sock.fileno(), self._accept)
        try:
            await asyncio.wait_for(self._until(self._all_listen), LISTENING_S)
        except asyncio.TimeoutError:
            there = {link.number for link in self._links.values() if link.is_listening}
            if not there:
                raise ConfigError(f"none of {self._count} front ends listens after {LISTENING_S:g} s; the log of the "
                                  "server has the reason") from None  # fmt: skip
            for number in sorted({*range(self._count)} - there):
                log.error("front end %d does not listen after %g s; clients that connect to it wait until it does, or "
                          "is killed, upon which it is started again", number, LISTENING_S)  # fmt: skip

    def part(self) -> None:
        """Has front ends say with each answer that its connection ends; all is answered."""
        self._tell(wire.PARTING)

    def close_doors(self) -> None:
        """Has front ends accept no more; clients who connect are another process's."""
        self._tell(wire.CLOSE)

    async def drain(self, *, keeps_sockets: bool) -> None:
        """Returns when nothing of a front end is left to be answered.

        Args:
            keeps_sockets: another engine process takes this one's place; the front ends stay, and hold requests until
                it is there. Else they let nobody in any more, and end.
        """
        self._tell(wire.PAUSE if keeps_sockets else wire.DRAIN)
        await self._until(self._is_idle if keeps_sockets else self._is_drained)

    def close(self) -> None:
        """Lets go of all links; what was written is still read."""
        self._looking.cancel()
        self._loop.remove_reader(self._meeting.sock.fileno())
        self._meeting.sock.close()
        if self.tensors is not None:
            self.tensors.stop()
        for sock in tuple(self._pending):
            self._drop(sock)
        for link in tuple(self._links.values()):
            link.channel.close()
            link.lose()
        self._links.clear()
        self._ledger_file.close()

    def families(self) -> Iterator[Metric]:
        """For a scrape."""
        rows = []
        for number in range(self._count):
            link = self._links.get(number)
            passed = self._requests[number] + (link.request_count if link else 0)
            crossed = self._tensors[number] + (link.tensor_count if link else 0)
            native = self._natives[number] + (link.native_count if link else 0)
            rows.append((link.connection_count if link else 0, passed, crossed, native, self._started[number]))
        return front_end_families(rows)

    def _all_listen(self) -> bool:
        return sum(link.is_listening for link in self._links.values()) == self._count

    def _is_idle(self) -> bool:
        return not any(link.in_flight or link.channel.waiting_size for link in self._links.values())

    def _is_drained(self) -> bool:
        return all(link.is_drained for link in self._links.values())

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):  # nobody says when the last answer has left for the ring
                await asyncio.wait_for(self._changed.wait(), _LOOK_S)

    def _tell(self, kind: int) -> None:
        if kind not in self._told:
            self._told.append(kind)
            for link in tuple(self._links.values()):
                link.channel.send(kind, 0, 0)

    # links

    def _accept(self) -> None:
        for _ in range(_PENDING_MAX):
            try:
                sock, _ = self._meeting.sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                log.error("a front end cannot be let in: %s", error.strerror)
                return
            sock.setblocking(False)
            if len(self._pending) >= _PENDING_MAX:
                sock.close()
                continue
            self._pending[sock] = self._loop.call_later(HELLO_S, self._drop, sock)
            self._loop.add_reader(sock.fileno(), self._greet, sock)

    def _forget(self, sock: socket.socket) -> None:
        self._pending.pop(sock).cancel()
        self._loop.remove_reader(sock.fileno())

    def _drop(self, sock: socket.socket) -> None:
        self._forget(sock)
        sock.close()

    def _greet(self, sock: socket.socket) -> None:
        try:
            said = sock.recv(wire.HELLO.size + 1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            said = b""
        number = self._number_of(sock, said)
        if number is None:
            if said:
                log.warning("somebody who is no front end has connected to the engine's socket, and was turned away")
            self._drop(sock)
            return
        self._forget(sock)
        try:
            self._join(sock, number)
        except ConnectionError:
            sock.close()  # it went while it waited
        except OSError as error:
            log.error("front end %d cannot be let in: %s", number, error.strerror or error)
            sock.close()

    def _number_of(self, sock: socket.socket, said: bytes) -> int | None:
        if len(said) != wire.HELLO.size:
            return None
        magic, version, number, secret = wire.HELLO.unpack(said)
        _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        is_ours = hmac.compare_digest(secret, self._meeting.secret) and uid == os.getuid()
        return number if is_ours and (magic, version) == (wire.MAGIC, wire.VERSION) and number < self._count else None

    def _join(self, sock: socket.socket, number: int) -> None:
        former = self._links.get(number)
        if former is not None:
            former.channel.close()
            self._lose(former, "another one has come in its place")
        files = LinkFiles.make()
        try:
            socket.send_fds(sock, [wire.MAGIC], [*files, self._ledger_file.fd])
            link = Link(number, self._apps, self._budget, self._shares, self.refused, self._error_format,
                        self._changed.set)  # fmt: skip
            rings = {} if self.tensors is None else {"rings": self.tensors.rings}
            link.channel = Channel(
                self._loop, sock, files, is_engine=True, body_size_max=self._shares.body_size_max,
                coming_size_max=self._shares.body_budget_size, on_frame=link.take,
                on_end=lambda reason: self._lose(link, reason), **rings,
            )  # fmt: skip
        except BaseException:
            for fd in files:
                os.close(fd)
            raise
        self._links[number] = link
        self._started[number] += 1
        if self.tensors is not None:
            link.rows = self.tensors.join(link, self._shares)
        for kind in self._told:
            link.channel.send(kind, 0, 0)

    def send_table(self, table: bytes) -> None:
        """Has all front ends know what they may send as tensors."""
        for link in tuple(self._links.values()):
            link.send_table(table)

    def _look(self) -> None:
        """Sees what is wanted of the budget of bodies, and that nobody keeps what it cannot use."""
        self._looking = self._loop.call_later(LOOK_S, self._look)
        self._budget.look()
        even = self._budget.size_max // (self._count + 1)
        is_wanted = self._ledger.wanting_count(time.monotonic_ns()) > 0
        for link in tuple(self._links.values()):
            held = self._ledger.held_by(link.number)
            link.keeping_count = link.keeping_count + 1 if is_wanted and held > even + link.size else 0
            if held > self._budget.size_max:
                link.channel.give_up("it says that it holds more bodies than there is memory for")
            elif link.keeping_count > _KEEPING_MAX:
                link.channel.give_up("it keeps memory for bodies that others wait for, and that it has no bodies for")

    def _lose(self, link: Link, reason: str) -> None:
        if self._links.get(link.number) is link:
            del self._links[link.number]
            self._ledger_file.clear(link.number)
            self._requests[link.number] += link.request_count
            self._tensors[link.number] += link.tensor_count
            self._natives[link.number] += link.native_count
        if not link.is_drained:
            log.warning("front end %d: %s; %d requests of its clients are dropped", link.number, reason, link.in_flight)
        with contextlib.suppress(Exception):
            link.lose()
        self._changed.set()
