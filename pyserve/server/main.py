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
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import uvloop

from pyserve import log as log_setup
from pyserve.archive.archive import Archive, open_archive
from pyserve.archive.cache import open_cache
from pyserve.archive.limits import use_limits
from pyserve.archive.model_folder import remove_left_overs
from pyserve.config.config import Config
from pyserve.config.model_source import ModelSource, nearest_file
from pyserve.conversion.torchscript import Tracing, needs_tracing, runs_in_python
from pyserve.errors import ConfigError, JsonObject, ModelLoadError, ModelNotFoundError, ServeError
from pyserve.fetch.sources import obtain_at_start
from pyserve.lanes.spawner import Spawner
from pyserve.launch import EXIT_DEVICE_LOST, EXIT_DRAINED, EXIT_REPLACED, EXIT_WILL_FAIL_AGAIN, SAME_SIGNAL_S
from pyserve.models.snapshot import models_to_restore, snapshot_folder
from pyserve.models.snapshot_models import SnapshotError, restored_state
from pyserve.models.state_file import STATE_NAME, read_state
from pyserve.os_errors import cause_of
from pyserve.request.descriptors import raise_open_files_max
from pyserve.server.console_file import ConsoleFile
from pyserve.server.handover import ServerStart, receive_server_start
from pyserve.server.housekeeping import Housekeeping
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
    atexit.register(gc.freeze)  # even at the end: to look through them takes 0.4 s, and the memory goes back anyway
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
    stop = _StopSignals()
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
    archives = _open_all(sources, errors, start.config.store_files())
    tracings = _begin_tracing(archives)
    hidden = re.compile(start.config.blacklist_env_vars) if start.config.blacklist_env_vars else None
    spawner = Spawner(
        lambda name: hidden is not None and hidden.fullmatch(name) is not None, worker_environment(start.config),
        open_files_max,
        start.family,
    )  # fmt: skip
    if any(isinstance(archive, Archive) and runs_in_python(archive) for archive in archives.values()):
        with contextlib.suppress(ServeError, OSError):  # what its models' workers meet too, and say
            spawner.prepare()

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
        await server.open_ports()
        start.report.ready(**await server.report())
        await asyncio.wait([stop.first, server.stuck.replacement, lost], return_when=asyncio.FIRST_COMPLETED)
        if lost.done():
            await _leave(server, logs)
        if not stop.first.done():
            log.error("another process takes this one's place, on the same sockets and with the same models: %s",
                      server.stuck.replacement.result())  # fmt: skip
        return await _drain(server, stop, start.config, logs)
    finally:
        for tracing in tracings.values():
            tracing.stop()
        await clearing
        await spawner.close()
        await server.grpc.close()
        server.close()
        stuck += server.stuck.what


def worker_environment(config: Config) -> dict[str, str]:
    """What handlers find in their environment as TorchServe's do, whatever ours says."""
    values = {
        "TS_DECODE_INPUT_REQUEST": config.decode_input_request,
        "TS_IPEX_ENABLE": config.ipex_enable,
        "TS_IPEX_GPU_ENABLE": config.ipex_gpu_enable,
    }
    return {name: "true" if is_set else "false" for name, is_set in values.items()}


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


def _open_all(
    sources: list[ModelSource], errors: dict[str, ServeError], store_files: list[str]
) -> dict[str, Archive | ServeError]:
    """The archives by path; ``errors`` are of those that could not even be fetched."""
    archives: dict[str, Archive | ServeError] = {**errors}
    for source in sources:
        path = source.path_or_file
        if path not in archives:
            archives[path] = _open(source, store_files)
            if source.url is not None and isinstance(archives[path], ServeError):
                Path(path).unlink(missing_ok=True)  # so that the next start fetches it anew
    return archives


def _open(source: ModelSource, store_files: list[str]) -> Archive | ServeError:
    try:
        return open_archive(source.path_or_file)
    except ModelNotFoundError as error:
        near = nearest_file(Path(source.path_or_file).name, store_files)
        return ModelNotFoundError(f"{error.message}; did you mean {near}?") if near else error
    except ServeError as error:
        return error
    except Exception as error:  # one archive, whatever it is, does not keep the others from being served
        log.exception("%s cannot be opened", source.shown)
        return ModelLoadError(f"{source.shown}: cannot be opened: {type(error).__name__}: {error}")


def _clear_cache() -> None:
    with contextlib.suppress(ServeError, OSError):  # whoever needs it says why it cannot be used
        cache = open_cache()
        cache.remove_drafts()
        remove_left_overs(cache.root / "models")


def _begin_tracing(archives: dict[str, Archive | ServeError]) -> dict[str, Tracing]:
    begun = {}
    for path, archive in archives.items():
        if isinstance(archive, Archive) and needs_tracing(archive):
            with contextlib.suppress(OSError):  # no room for another process yet; loading the model tries again
                begun[path] = Tracing(archive)
    return begun


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


if __name__ == "__main__":
    sys.exit(main())
