"""A front-end process: accepts connections, reads requests, and has the engine process answer them.

Started by the supervisor, and beside the engine: neither is the other's parent. No torch here. It is told by the engine
when to let clients in and when to end; signals, which a service manager sends to all processes at once, are the
supervisor's.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import uvloop

from pyserve import log as log_setup
from pyserve.errors import ConfigError
from pyserve.fronts import listening
from pyserve.fronts.door import Door
from pyserve.fronts.fast_forms import lines_of, may_be_fast
from pyserve.fronts.meeting import Way
from pyserve.fronts.shares import Shares
from pyserve.http1.connections import Connections
from pyserve.http1.fast_protocol import FastProtocol, FastTlsProtocol
from pyserve.http1.protocol import Http1Protocol
from pyserve.http1.tls import Http1TlsProtocol
from pyserve.launch import EXIT_DRAINED
from pyserve.request.descriptors import DescriptorLimit, open_files_max, raise_open_files_max
from pyserve.security import tls
from pyserve.security.renewal import keep_renewed, watched
from pyserve.server.console_file import ConsoleFile
from pyserve.server.handover import ServerStart, receive_server_start
from pyserve.server.housekeeping import Housekeeping
from pyserve.server.last_clients import accept_last, file_identities
from pyserve.telemetry.server_logs import ServerLogs

log = logging.getLogger(__name__)

EXIT_FAILED = 1
ACCEPT_BACKLOG = 2048
GC_THRESHOLD = 20_000
COMPRESSING_COUNT = 2  # threads


def main() -> int:
    gc.disable()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    start = receive_server_start()
    raise_open_files_max()
    console = log_setup.configure(start.config.log_level.upper(), as_json=start.config.log_format == "json")
    logs = ServerLogs(start.config, console=console.write_lines if start.like_torchserve else None)
    housekeeping = Housekeeping([ConsoleFile(Path(start.log_file)).look] if start.log_file else [])
    housekeeping.start()
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(_serve(start, logs))
    except ConfigError as error:
        log.error("a front end cannot begin: %s", error)
    except Exception:
        log.exception("a front end failed")
    finally:
        loop.close()
        logs.close()
        housekeeping.stop()
    return EXIT_FAILED


async def _serve(start: ServerStart, logs: ServerLogs) -> int:
    front_end = FrontEnd(start, logs)
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    gc.enable()
    front_end.door.start()
    await front_end.drained
    front_end.door.stop()
    return EXIT_DRAINED


class FrontEnd:
    """The listeners of this process. Loop thread only.

    Attributes:
        door: the way to the engine.
        drained: done when the engine has had it let nobody in any more, and all are answered.

    Raises:
        ConfigError: the certificate cannot be used.
    """

    def __init__(self, start: ServerStart, logs: ServerLogs):
        assert start.fronts is not None
        config = self._config = start.config
        way, shares = Way.of(start.fronts), Shares.of(config)
        format = listening.error_format(config)
        descriptors = DescriptorLimit(open_files_max())
        bodies = shares.new_budget()
        self.drained: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._log = logs.access
        self._listeners = listening.grouped(start.sockets)
        self._files = file_identities(start.sockets.values())
        self._connections: list[Connections] = []
        compression = listening.new_compression(config, ThreadPoolExecutor(COMPRESSING_COUNT, "compression"))
        for _, names in self._listeners:
            connections = listening.new_connections(
                config, names, shares.connection_count_max, bodies, descriptors, format, compression
            )
            connections.on_answer = logs.access.observe_http
            self._connections.append(connections)
        if way.number == 0:
            listening.warn_of_few_descriptors(shares.connection_count_max, descriptors)
        self.door = Door(way, shares, format, on_open=self._open, on_parting=self._part, on_close=self._close,
                         on_drain=self._drain, answer_size_max=config.max_response_size, bodies=bodies)  # fmt: skip
        self.door.row_listeners = frozenset(
            number for number, (_, names) in enumerate(self._listeners) if "inference" in names
        )
        self.door.connections = self._connections
        self._tls = None
        if any(address.is_tls for address in config.addresses().values()):
            tls.restore(config)
            self._tls = tls.server_context(config)
        self._renewing = asyncio.ensure_future(keep_renewed(watched(config, self._tls, None)))
        self._servers: list[asyncio.AbstractServer] = []
        self._opening: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._is_closed = False

    def _open(self) -> None:
        for connections in self._connections:
            connections.parting = connections.draining
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._listen())
        elif self._opening.done():
            self.door.tell_listening()

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        for number, (sock, names) in enumerate(self._listeners):
            context = self._tls if self._config.addresses()[names[0]].is_tls else None
            connect = self._protocol_maker(number, is_tls=context is not None)
            options = listening.tls_options(context)
            self._servers.append(await loop.create_server(connect, sock=sock, backlog=ACCEPT_BACKLOG, **options))
        self.door.tell_listening()

    def _protocol_maker(self, number: int, *, is_tls: bool) -> Callable[[], Http1Protocol]:
        """What makes the protocols of the connections of the listener of this number."""
        connections, app, fast = self._connections[number], self.door.app(number), self.door.fast
        if fast is None or number not in self.door.row_listeners or not may_be_fast(self._config, self._log):
            return partial(Http1TlsProtocol if is_tls else Http1Protocol, app, connections.limits, connections)
        make = fast.listen(number, connections, app, lines_of(self._log), self._config.max_response_size)
        return partial(make, FastTlsProtocol if is_tls else FastProtocol)

    def _part(self) -> None:
        for connections in self._connections:
            connections.part()

    def _close(self) -> None:
        self._is_closed = True
        for server in self._servers:
            server.close()

    def _drain(self) -> None:
        if self._leaving is None:
            self._leaving = asyncio.ensure_future(self._leave())

    async def _leave(self) -> None:
        if self._opening is not None:
            await self._opening
        self._part()
        if not self._is_closed:
            await accept_last([sock for sock, _ in self._listeners], self._files)
        for server in self._servers:
            server.close()
        await asyncio.gather(*(connections.drain() for connections in self._connections))
        self._renewing.cancel()
        self.door.tell_drained()
        self.drained.set_result(None)


if __name__ == "__main__":
    sys.exit(main())
