"""The server process: takes over the listening sockets, loads the models, serves, drains.

Started by the supervisor. Nothing at the top of this file imports torch: eager archives begin to be traced in
processes of their own before this one spends its second on that import.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import uvloop

from pyserve import log as log_setup
from pyserve.archive.cache import open_cache
from pyserve.archive.limits import use_limits
from pyserve.archive.model_folder import remove_left_overs
from pyserve.config.config import Config
from pyserve.config.model_source import ModelSource
from pyserve.errors import ConfigError, JsonObject, ServeError
from pyserve.fetch.sources import obtain_at_start
from pyserve.launch import EXIT_DEVICE_LOST, EXIT_DRAINED, EXIT_REPLACED, EXIT_WILL_FAIL_AGAIN, SAME_SIGNAL_S
from pyserve.models.snapshot import models_to_restore, snapshot_folder
from pyserve.models.snapshot_models import SnapshotError, restored_state
from pyserve.models.state_file import STATE_NAME, read_state
from pyserve.os_errors import cause_of
from pyserve.request.descriptors import raise_open_files_max
from pyserve.server.console_file import ConsoleFile
from pyserve.server.handover import ServerStart, receive_server_start
from pyserve.server.housekeeping import Housekeeping
from pyserve.server.kept_files import KeptFiles
from pyserve.server.opening import begin_tracing, new_spawner, open_all, prepare_workers
from pyserve.server.orders import Orders
from pyserve.server.settings_report import settings_lines
from pyserve.telemetry.server_logs import ServerLogs

if TYPE_CHECKING:
    from pyserve.server.server import Server

log = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_DRAIN_CUT_SHORT = 4
# How long the loop waits for a thread of the pool that runs Python; its own number is 5 ms, for each time it asks.
SWITCH_INTERVAL_S = 0.001
# Objects that may be made, and not yet be gone, before the youngest are looked through; Python's own number is 700.
GC_THRESHOLD = 20_000


def main() -> int:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.disable()  # imports and loading make a million objects, nearly all of which stay
    start = receive_server_start()
    open_files_max = raise_open_files_max()
    log_setup.print_lines_at_once()  # for handlers that run here
    console = log_setup.configure(start.config.log_level.upper(), as_json=start.config.log_format == "json")
    logs = ServerLogs(start.config, console=console.write_lines if start.like_torchserve else None)
    housekeeping = Housekeeping([ConsoleFile(Path(start.log_file)).look] if start.log_file else [])
    housekeeping.start()
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    code, stuck = EXIT_FAILED, list[str]()
    try:
        code = loop.run_until_complete(_serve(start, logs, open_files_max, stuck))
    except ConfigError as error:
        start.report.failed(error.message)
        return EXIT_WILL_FAIL_AGAIN
    except Exception as error:
        log.exception("the server failed")
        start.report.failed(cause_of(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}")
        return EXIT_FAILED
    finally:
        loop.close()
        logs.close()
        housekeeping.stop()
        if isinstance(start.kept, KeptFiles):
            start.kept.folder.remove()
    if stuck:
        # They cannot be ended nor waited for, and must not find the interpreter gone.
        log.warning("the process ends although threads of it are stuck: %s", "; ".join(stuck))
        logging.shutdown()
        os._exit(code)
    return code


async def _serve(start: ServerStart, logs: ServerLogs, open_files_max: int, stuck: list[str]) -> int:
    """The exit code.

    Args:
        open_files_max: what worker processes have for a limit, as any process of ours would.
        stuck: is given what runs in threads that are still there.
    """
    use_limits(start.config)
    stop, orders = _StopSignals(), Orders(start.orders_fd, asyncio.get_running_loop())
    state = _state_to_restore(start)
    sources = start.config.models_to_load() if state is None else _sources_of(state)
    fetching = asyncio.ensure_future(obtain_at_start(start.config, sources, start.report.progress))
    first: list[asyncio.Future[Any]] = [fetching, stop.first]
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    if not fetching.done():
        fetching.cancel()
        return EXIT_DRAINED
    sources, errors = fetching.result()
    # Models' folders of servers that were killed, the one before this one perhaps.
    clearing = asyncio.ensure_future(asyncio.to_thread(_clear_cache))
    archives = open_all(sources, errors, start.config.store_files())
    tracings = begin_tracing(archives)
    spawner = new_spawner(start.config, open_files_max, start.family)
    prepare_workers(spawner, archives)

    # Takes a second or two; what was begun above goes on meanwhile.
    from pyserve.models.placement import gpu_count
    from pyserve.server.server import Server

    if start.restart == 0:
        log.info("\n".join(["settings:", *settings_lines(start.config, gpus=gpu_count(start.config.number_of_gpu))]))
    server = Server(start, spawner, logs)
    try:
        loading = asyncio.ensure_future(server.load(sources, archives, tracings, state))
        lost = server.lost_devices.loss
        await asyncio.wait([loading, stop.first, lost], return_when=asyncio.FIRST_COMPLETED)
        if lost.done():
            await _leave(server, logs)
        if not loading.done():
            loading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await loading
            return EXIT_DRAINED
        loading.result()
        gc.collect()
        gc.freeze()  # what is there now is there for good: no collection need look at it again
        gc.set_threshold(GC_THRESHOLD)  # a request leaves no cycles behind, but makes enough to have them looked for
        gc.enable()
        if start.is_successor and not await _is_to_open(start, server, orders, stop):
            return EXIT_DRAINED
        _hold_when_told(server, orders)
        await server.open_ports()
        start.report.ready(**await server.report())
        ends = [stop.first, server.stuck.replacement, lost, orders.gives_way]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if lost.done():
            await _leave(server, logs)
        if orders.gives_way.done():
            server.give_way()
        elif not stop.first.done():
            log.error("another process takes this one's place, on the same sockets and with the same models: %s",
                      server.stuck.replacement.result())  # fmt: skip
        return await _drain(server, stop, start.config, logs)
    finally:
        orders.close()
        for tracing in tracings.values():
            tracing.stop()
        await clearing
        await spawner.close()
        await server.grpc.close()
        server.close()
        stuck += server.stuck.what


async def _is_to_open(start: ServerStart, server: Server, orders: Orders, stop: _StopSignals) -> bool:
    """Waits for the supervisor's word on what was loaded: whether this server is to take the other's place."""
    start.report.send("loaded", **await server.report())
    ends: list[asyncio.Future[Any]] = [orders.opens, stop.first, server.lost_devices.loss]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    return orders.opens.done()


def _hold_when_told(server: Server, orders: Orders) -> None:
    tasks = set[asyncio.Future[None]]()  # references, so that they come to their end
    orders.on_hold = lambda holds: tasks.add(asyncio.ensure_future(server.hold() if holds else server.release()))


async def _leave(server: Server, logs: ServerLogs) -> NoReturn:
    """A device is lost: ends the process, since nothing else makes it work again, or lets go of its memory."""
    await server.leave(server.lost_devices.loss.result())
    logs.close()
    logging.shutdown()
    os._exit(EXIT_DEVICE_LOST)


async def _drain(server: Server, stop: _StopSignals, config: Config, logs: ServerLogs) -> int:
    """Answers what was accepted, then stops. A second signal, or the timeout, ends it early. Without a signal another
    process takes over, unless there is one meanwhile.

    SIGTERM comes from a machine that replaces the server, perhaps: for `drain_delay_s` all is answered as ever, while
    load balancers see that the server is not ready, and clients that their connections are closed. SIGINT comes from
    somebody who waits.
    """
    server.part()
    timeout_s = config.drain_timeout_s
    is_replaced = not stop.first.done()
    if (is_replaced or stop.first.result() == signal.SIGTERM) and config.drain_delay_s:
        ends = [stop.first if is_replaced else stop.second, server.lost_devices.loss]
        await asyncio.wait(ends, timeout=config.drain_delay_s, return_when=asyncio.FIRST_COMPLETED)
    draining = asyncio.ensure_future(server.drain(keeps_sockets=not stop.first.done()))
    ends = [draining, stop.second, server.lost_devices.loss]
    await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    if server.lost_devices.loss.done():
        await _leave(server, logs)
    if draining.done():
        draining.result()
        return EXIT_DRAINED if stop.first.done() else EXIT_REPLACED
    log.warning("stopping before everything was answered: %s",
                "told twice" if stop.second.done() else f"drain_timeout_s={timeout_s} is over")  # fmt: skip
    await server.cut_short()
    # Native threads may be in the middle of a batch and cannot be stopped; the process goes without them.
    logging.shutdown()
    os._exit(EXIT_DRAIN_CUT_SHORT if stop.first.done() else EXIT_REPLACED)


def _clear_cache() -> None:
    with contextlib.suppress(ServeError, OSError):  # whoever needs it says why it cannot be used
        cache = open_cache()
        cache.remove_drafts()
        remove_left_overs(cache.root / "models")


def _state_to_restore(start: ServerStart) -> JsonObject | None:
    """What the server before this one served, if it got as far as serving; else what a snapshot says, if one is to be
    restored.

    Raises:
        ConfigError: ``model_snapshot`` in the configuration cannot be used.
    """
    state = read_state(start.kept.get(STATE_NAME)) if start.restart else None
    if state is not None:
        return state
    try:
        models = models_to_restore(start.config, snapshot_folder())
    except SnapshotError as error:
        place = start.config.origin.get("model_snapshot", "the configuration")
        raise ConfigError(f"{place}: model_snapshot: {error}") from None
    return None if models is None else restored_state(models)


def _sources_of(state: JsonObject) -> list[ModelSource]:
    return [ModelSource(entry["name"], entry["path"]) for entry in state["models"]]


class _StopSignals:
    """The first and the second SIGTERM or SIGINT, as futures of their numbers."""

    def __init__(self) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._first_at = 0.0
        self.first: asyncio.Future[Any] = loop.create_future()
        self.second: asyncio.Future[Any] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        if not self.first.done():
            self._first_at = self._loop.time()
            self.first.set_result(number)
        elif not self.second.done() and self._loop.time() - self._first_at > SAME_SIGNAL_S:
            self.second.set_result(number)


def _end(code: int) -> NoReturn:
    """Ends the process as Python does, but for taking the interpreter apart: a thread that comes back from a run of a
    network finds it gone then, and ends the process by a signal."""  # fmt: skip
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main())
