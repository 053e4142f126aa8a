"""An engine that runs: the wiring of a server process without its process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import Sequence
from pathlib import Path

from pyserve.api.routes import Router
from pyserve.archive.archive import Archive
from pyserve.config.config import Config
from pyserve.conversion.torchscript import Tracing
from pyserve.embedding.given_models import AnyModel, ModuleFolder, sources_of
from pyserve.embedding.local_call import LocalCalls
from pyserve.embedding.logs import EngineLogs
from pyserve.errors import ServeError
from pyserve.fetch.sources import obtain_at_start
from pyserve.http1.connections import Connections
from pyserve.lanes.spawner import Spawner
from pyserve.launch import Reporter
from pyserve.server.handover import ServerStart
from pyserve.server.opening import begin_tracing, new_spawner, open_all, prepare_workers
from pyserve.server.server import Server
from pyserve.serving import ServingError
from pyserve.worker.descendants import new_token

log = logging.getLogger("pyserve.embedded")


class _Memory:
    """What a server process keeps for the one that takes its place; there is none."""

    def get(self, name: str) -> bytes | None:
        return None

    def put(self, name: str, content: bytes) -> str:
        return ""


class _Progress(Reporter):
    """Reports as records of Python's logging."""

    def __init__(self) -> None:
        super().__init__(-1)

    def progress(self, model: str, text: str) -> None:
        log.info("%s: %s", model, text)


class Running:
    """Made by `start`. Loop thread only.

    Attributes:
        loop: that it runs on.
        server: models, endpoints, metrics.
        calls: requests from Python.
        folder: of modules' files.
        problem: why the process should be replaced; ``""`` if nothing is wrong.
    """

    def __init__(self, config: Config, server: Server, spawner: Spawner, folder: ModuleFolder):
        self.loop = asyncio.get_running_loop()
        self.config = config
        self.server = server
        self.folder = folder
        self.problem = ""
        self.calls = LocalCalls(
            server.router(["inference", "management", "metrics"], is_trusted=True), config.max_request_size,
            server.bodies,
        )  # fmt: skip
        self._listeners: dict[tuple[str, ...], tuple[Router, Connections]] = {}
        self._spawner = spawner
        self._watching = self.loop.create_task(self._watch())

    @classmethod
    async def start(cls, models: Sequence[AnyModel], config: Config) -> Running:
        """Loads ``models``.

        Raises:
            ServingError: one cannot be loaded. Nothing is left of the start.
        """
        folder = ModuleFolder()
        try:
            return await cls._start(models, config, folder)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(folder.close))
            raise

    @classmethod
    async def _start(cls, models: Sequence[AnyModel], config: Config, folder: ModuleFolder) -> Running:
        progress = _Progress()
        sources = await asyncio.to_thread(sources_of, models, config.model_store, folder)
        sources, errors = await obtain_at_start(config, sources, progress.progress)
        archives = await asyncio.to_thread(open_all, sources, errors, config.store_files())
        start = ServerStart(
            config=config, sockets={}, restart=0, folder=Path.cwd(), kept=_Memory(), report=progress,
            like_torchserve=False, log_file="", family=new_token(), is_embedded=True,
        )  # fmt: skip
        tracings: dict[str, Tracing] = {}
        spawner: Spawner | None = None
        server: Server | None = None
        try:
            tracings = begin_tracing(archives)
            spawner = new_spawner(config, None, start.family)
            prepare_workers(spawner, archives)
            server = Server(start, spawner, EngineLogs())
            await server.load(sources, archives, tracings, None)
            failures = _failures(server)
            if failures:
                raise ServingError("; ".join(failures))
            await server.open_ports()
        except BaseException:
            await asyncio.shield(_undo(server, spawner, archives))
            raise
        finally:
            for tracing in tracings.values():
                tracing.stop()
        return cls(config, server, spawner, folder)

    @property
    def has_lost_spawner(self) -> bool:
        """Whether what worker processes are forked from has gone. Another one is started when a worker is wanted."""
        return self._spawner.is_lost

    def loads(self) -> tuple[float, float]:
        """The busy share of the busiest model's workers, 0..1, and the longest wait of a new request, in s."""
        found = [each[1:] for each in self.server.metrics.loads(self.server.registry.all_models())]
        return max((share for share, _ in found), default=0.0), max((wait_s for _, wait_s in found), default=0.0)

    def listener(self, names: tuple[str, ...]) -> tuple[Router, Connections]:
        """What answers those who reach the APIs of ``names`` from outside, and what their requests have in common."""
        found = self._listeners.get(names)
        if found is None:
            config = self.config
            served = [name for name in names if name != "metrics" or config.enable_metrics_api]
            found = self._listeners[names] = self.server.router(served), self.server.new_connections(served)
        return found

    async def stop(self) -> None:
        """Answers what was accepted, within ``drain_timeout_s``, and ends all that was begun."""
        self._watching.cancel()
        try:
            try:
                await asyncio.wait_for(self.server.drain(), self.config.drain_timeout_s)
            except asyncio.TimeoutError:
                log.warning("stopping before everything was answered: drain_timeout_s=%d is over",
                            self.config.drain_timeout_s)  # fmt: skip
                await self.server.cut_short()
        finally:
            await asyncio.shield(self._end())

    async def _end(self) -> None:
        await self._spawner.close()
        self.server.close()
        await asyncio.to_thread(self.folder.close)
        gc.collect()  # models and their lanes refer to each other, and hold weights and descriptors

    async def _watch(self) -> None:
        """What ends a server process shows here as `problem`, and in the health checks."""
        server = self.server
        ends: list[asyncio.Future[object]] = [server.lost_devices.loss, server.stuck.replacement]  # type: ignore[list-item]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if server.lost_devices.loss.done():
            loss = server.lost_devices.loss.result()
            self.problem = f"the device {loss.device} is lost: {loss.reason}"
            await server.leave(loss)
        else:
            self.problem = f"threads are stuck: {server.stuck.replacement.result()}"
            server.part()
        log.error("%s; this process should be replaced", self.problem)


def _failures(server: Server) -> list[str]:
    failed = [f"{model.name} {model.version}: {model.error}" for model in server.registry.all_models()
              if model.state == "FAILED"]  # fmt: skip
    return failed + [f"{failure.name}: {failure.error}" for failure in server.registry.failures]


async def _undo(server: Server | None, spawner: Spawner | None, archives: dict[str, Archive | ServeError]) -> None:
    """Ends what a start that failed has begun."""
    if server is not None:
        with contextlib.suppress(Exception):
            await server.drain()
    if spawner is not None:
        await spawner.close()
    if server is not None:
        server.close()
        return
    for archive in archives.values():
        if isinstance(archive, Archive):
            archive.close()
