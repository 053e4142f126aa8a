"""Everything one server process serves with: engine, models, endpoints and listeners, wired together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyserve.api.checks import protected, rotation_routes
from pyserve.api.coded_bodies import CodedBodies
from pyserve.api.inference import Inference
from pyserve.api.kserve import KServe
from pyserve.api.management import Management
from pyserve.api.model_repository import ModelRepository
from pyserve.api.routes import Router, RouteRow, inference_descriptions, metrics_routes
from pyserve.api.triton_extensions import TritonExtensions
from pyserve.archive.archive import Archive
from pyserve.config.config import Config
from pyserve.config.model_source import ModelSource
from pyserve.conversion.torchscript import Tracing
from pyserve.cpu_budget import cpu_budget
from pyserve.engine import Engine
from pyserve.errors import ConfigError, JsonObject, ServeError
from pyserve.fronts.listening import (
    error_format,
    grouped,
    new_compression,
    new_connections,
    tls_options,
    warn_of_few_descriptors,
)
from pyserve.fronts.meeting import Meeting
from pyserve.fronts.shares import Shares
from pyserve.grpc_api.front_end import GrpcFrontEnd
from pyserve.http1.connections import Connections
from pyserve.http1.limits import Http1Limits
from pyserve.http1.protocol import Http1Protocol
from pyserve.http1.tls import Http1TlsProtocol
from pyserve.lanes.lost_devices import LOSSES_NAME, DeviceLoss, LostDevices
from pyserve.lanes.preprocess_pool import PreprocessPool
from pyserve.lanes.resources import Services
from pyserve.lanes.spawner import Spawner
from pyserve.lanes.stuck import StuckThreads, stuck_max
from pyserve.models.placement import gpu_count
from pyserve.models.registry import Registry
from pyserve.models.snapshot import SnapshotFolder, snapshot_folder
from pyserve.models.state_file import STATE_NAME
from pyserve.request.body_budget import BodyBudget
from pyserve.request.descriptors import DescriptorLimit, open_files_max
from pyserve.security.browser_guard import BrowserGuard
from pyserve.security.cors import Cors, allowed_origins
from pyserve.security.renewal import keep_renewed, watched
from pyserve.security.tls import restore as restore_certificate
from pyserve.security.tls import server_context
from pyserve.security.tokens import Tokens
from pyserve.server.handover import ServerStart
from pyserve.server.last_clients import accept_last, file_identities
from pyserve.server.start_table import start_table
from pyserve.telemetry.device_metrics import loss_family
from pyserve.telemetry.loop_watch import LoopWatch
from pyserve.telemetry.metrics import Metrics, MetricsOptions
from pyserve.telemetry.metrics_config import MetricsConfig, MetricsConfigError, read_metrics_config
from pyserve.telemetry.server_logs import ServerLogs, metrics_mode
from pyserve.telemetry.spans import open_tracer
from pyserve.telemetry.system_metrics import SystemMetrics

if TYPE_CHECKING:
    from pyserve.fronts.gate import Gate

log = logging.getLogger("pyserve.site")

ACCEPT_BACKLOG = 2048
# How long requests of models on other devices may take when one is lost. Nobody is to wait longer for the next process.
OTHERS_S = 0.7
# Time for the last answers to leave when draining is cut short.
CUT_SHORT_WRITE_S = 0.1


class Server:
    """One server process's worth of everything. Loop thread only.

    Args:
        spawner: starts worker processes; whoever made it closes it.
        logs: the log files.

    Raises:
        ConfigError: the native engine cannot be used.
    """

    def __init__(self, start: ServerStart, spawner: Spawner, logs: ServerLogs):
        config = start.config
        budget = cpu_budget(config.cpu_budget)
        # Preprocessing runs on threads of its own, one per CPU; torch must not multiply them.
        torch.set_num_threads(1)
        restore_certificate(config)
        self._start = start
        self._logs = logs
        self._metrics = Metrics(torch_version=torch.__version__, options=_metrics_options(config), log=logs.metrics)
        self._measuring: asyncio.Task[None] | None = None
        self._engine = Engine(asyncio.get_running_loop(), budget)
        stuck = StuckThreads(stuck_max(config.stuck_threads_max, budget), lambda: self._engine.lost_count)
        # A thread takes over torch's number of threads when it first asks for it, and the workers will change that
        # number for all who ask later; so every thread of the pool asks now.
        self._pool = PreprocessPool(config.preprocess_threads or budget, stuck, torch.get_num_threads)
        self.lost_devices = LostDevices(
            start.kept.get(LOSSES_NAME), self._engine.core.probe_device, losses_max=config.device_losses_max
        )
        self._engine.watch(self._look_at_devices)
        self._services = services = Services(
            config=config,
            engine=self._engine,
            metrics=self._metrics,
            preprocess_pool=self._pool,
            spawner=spawner,
            tokens=Tokens.open(config, start.kept, Path.cwd()),
            tracer=open_tracer(),
            descriptors=DescriptorLimit(open_files_max()),
            stuck=stuck,
            lost_devices=self.lost_devices,
            error_format=error_format(config),
        )
        self.stuck = stuck
        self.registry = Registry(
            services,
            keep_state=lambda content: start.kept.put(STATE_NAME, content),
            snapshots=None if config.no_config_snapshots else SnapshotFolder(snapshot_folder(), config),
            progress=start.report.progress,
        )
        self._metrics.models = self.registry.all_models
        shares = Shares.of(config) if start.fronts else None
        # A request of the size that is allowed is never one too many.
        whole = max(Http1Limits().body_budget_size, config.max_request_size)
        self._bodies = BodyBudget(shares.body_budget_size if shares else whole)
        is_strict = config.compat == "strict"
        self._inference = Inference(
            self.registry,
            CodedBodies(config.max_request_size, self._bodies, self._pool, is_on=not is_strict),
            tells_errors=services.error_format.with_private_detail,
            lenient=is_strict,
        )
        self._compression = new_compression(config, self._pool)
        self._repository = ModelRepository(
            self.registry, config, tells_errors=services.error_format.with_private_detail, tokens=services.tokens
        )
        self.grpc = GrpcFrontEnd(config, start.restart)
        self._servers: list[asyncio.AbstractServer] = []
        self._files = file_identities(start.sockets.values())
        self._connections: list[Connections] = []
        self._gate: Gate | None = None
        if start.fronts and shares is not None:
            from pyserve.fronts.gate import Gate  # not above: without front ends nothing of it is needed

            self._gate = Gate(
                Meeting.of_engine(start.fronts), config.front_ends, shares, self._bodies, services.error_format
            )
            self._metrics.refused.append(self._gate.refused)
            self._metrics.more.append(self._gate.families)
        self._tls: ssl.SSLContext | None = None
        self._renewing: asyncio.Future[None] | None = None
        self._watch = LoopWatch()
        self._metrics.more.append(self._watch.families)
        self._metrics.more.append(lambda: [loss_family(services.lost_devices.counts())])
        log.info("%d CPUs for %d preprocessing threads and the workers of all models", budget,
                 config.preprocess_threads or budget)  # fmt: skip

    async def load(
        self,
        sources: Sequence[ModelSource],
        archives: dict[str, Archive | ServeError],
        tracings: dict[str, Tracing],
        state: JsonObject | None,
    ) -> None:
        """Loads what the server is started with, or what the one before it, or a snapshot, says was served.

        Meanwhile gRPC takes its ports.
        """
        binding = asyncio.ensure_future(self.grpc.bind())
        loading = asyncio.ensure_future(self._load_models(sources, archives, tracings, state))
        try:
            await asyncio.gather(binding, loading)
        finally:
            for task in (binding, loading):
                task.cancel()

    async def _load_models(
        self,
        sources: Sequence[ModelSource],
        archives: dict[str, Archive | ServeError],
        tracings: dict[str, Tracing],
        state: JsonObject | None,
    ) -> None:
        if state is not None:
            await self.registry.restore(state, archives, tracings)
        else:
            await self.registry.load_at_start(sources, archives, tracings)

    async def open_ports(self) -> None:
        """Begins to accept. Names that share an address share a listener, which then answers for all of them."""
        config = self._start.config
        listeners = grouped(self._start.sockets)
        if self._gate is not None:
            for sock, _ in listeners:
                sock.close()  # the front ends have theirs
            self._inference.is_ready = True  # before the first request comes
            await self._gate.open([self._router(names) for _, names in listeners])
        else:
            for sock, names in listeners:
                await self._listen(sock, names)
        all_watched = watched(self._start.config, self._tls, self._services.tokens)
        self._renewing = asyncio.ensure_future(keep_renewed(all_watched))
        if not config.disable_system_metrics:
            system = SystemMetrics(
                self._metrics.host, config.metric_time_interval, command=config.system_metrics_cmd,
                gpus=gpu_count(config.number_of_gpu),
            )  # fmt: skip
            self._measuring = asyncio.ensure_future(system.run())
        self._watch.start()
        self._inference.is_ready = True
        await self.grpc.open(
            self._services, self.registry, self._inference, self._bodies, self._logs.access, repository=self._repository
        )

    def _router(self, names: list[str]) -> Router:
        return Router(
            self._rows(names),
            error_format=self._services.error_format,
            cors=Cors(self._start.config),
            on_answer=self._metrics.observe_answer,
        )

    async def _listen(self, sock: Any, names: list[str]) -> None:
        config, services = self._start.config, self._services
        count = config.connection_count_max
        connections = new_connections(
            config, names, count, self._bodies, services.descriptors, services.error_format, self._compression
        )
        self._connections.append(connections)
        if "inference" in names:
            warn_of_few_descriptors(count, services.descriptors)
        connections.on_answer = self._logs.access.observe_http
        self._metrics.refused.append(connections.refused)
        router = self._router(names)
        if config.addresses()[names[0]].is_tls and self._tls is None:
            self._tls = server_context(config)
        context = self._tls if config.addresses()[names[0]].is_tls else None
        protocol = Http1Protocol if context is None else Http1TlsProtocol
        self._servers.append(
            await asyncio.get_running_loop().create_server(
                lambda: protocol(router, connections.limits, connections), sock=sock, backlog=ACCEPT_BACKLOG,
                **tls_options(context),
            )
        )  # fmt: skip

    def _rows(self, names: list[str]) -> list[RouteRow]:
        """What the listener of ``names`` answers. Each path has the checks of its own API, also where all share one."""
        config, tokens = self._start.config, self._services.tokens
        rows: list[RouteRow] = []
        kserve = KServe(
            self.registry, self._inference, self._metrics, config.max_response_size,
            is_strict=config.compat == "strict", error_format=self._services.error_format,
        )  # fmt: skip
        triton = TritonExtensions(self.registry, self._repository, config)
        origins = allowed_origins(config)
        has_control = config.model_control_on_inference
        if "inference" in names:
            shows_store = has_control or "management" in names
            inference = [*self._inference.routes(), *kserve.routes(), *triton.reading_routes()]
            inference.append(triton.index_route(shows_store=shows_store))
            refused = triton.refused_routes(has_control=shows_store)
            control = triton.control_routes() if has_control and "management" not in names else []
            described = inference_descriptions([*inference, *control], self.registry.get)
            rows += protected([*inference, *refused, *described], tokens, "inference")
            rows += protected(control, tokens, "management", BrowserGuard(config.inference_address, origins))
        if "management" in names:
            tells_errors = self._services.error_format.with_private_detail
            guard = BrowserGuard(config.management_address, origins)
            rotation = rotation_routes(tokens)
            control = triton.control_routes()
            if "inference" not in names:
                control += [*kserve.reading_routes(), *triton.reading_routes(), triton.index_route(shows_store=True)]
            neighbours = [pattern for _, pattern, _ in (*rotation, *control)]
            management = Management(self.registry, config, tells_errors=tells_errors, neighbours=neighbours).routes()
            rows += protected([*management, *control], tokens, "management", guard)
            rows += protected(rotation, None, "api", guard)
        # By DNS rebinding a page of any site could read them, too.
        metrics = protected(metrics_routes(self._metrics), None, "inference", BrowserGuard(config.metrics_address))
        if names == ["metrics"]:
            rows += metrics
        elif "metrics" in names or (len(names) > 1 and config.enable_metrics_api):  # as SageMaker has them, on one port
            rows += metrics[2:]
        return rows

    async def report(self) -> dict[str, Any]:
        """What the start-up table shows, see `start_table`."""
        return await start_table(self._start.config, self.registry, self.grpc, self._services.tokens)

    def part(self) -> None:
        """Says that the server goes: its health is off, and each answer is its connection's last. All is answered."""
        self._inference.is_ready = False
        if self._gate is not None:
            self._gate.part()
        for connections in self._connections:
            connections.part()

    async def drain(self, *, keeps_sockets: bool = False) -> None:
        """In this order: no new connections, answer what was accepted, stop the models.

        Args:
            keeps_sockets: whoever connects from now on waits for the process that takes this one's place.
        """
        self.part()
        self.registry.stop_fetching()
        if self._gate is not None:
            await asyncio.gather(self.grpc.drain(), self._gate.drain(keeps_sockets=keeps_sockets))
        else:
            if not keeps_sockets:
                await accept_last(self._start.sockets.values(), self._files)
            for server in self._servers:
                server.close()
            await asyncio.gather(self.grpc.drain(), *(connections.drain() for connections in self._connections))
        await self.registry.drain()
        log.info("drained")

    def _look_at_devices(self) -> None:
        for device, reason in self._engine.core.lost_devices():
            self.lost_devices.note(device, reason)

    async def leave(self, loss: DeviceLoss) -> None:
        """A device is lost: answers whoever waits, so that the process can end; see `LostDevices`.

        Its models' requests are answered at once. The others' have OTHERS_S to come to their answers; whoever connects
        from now on waits for the next process. Nothing of the device is let go.
        """
        self.part()
        models = self.registry.all_models()
        of_device = [model for model in models if loss.device in model.resident.devices]
        loading = [f"{model.name} {model.version}" for model in of_device if model.is_loading]
        is_in_use = any(model.state == "READY" for model in of_device)
        for model in models:
            model.lose_device(loss)
        for server in self._servers:
            server.close()
        with contextlib.suppress(OSError):  # the next server tries the device, then
            self._start.kept.put(LOSSES_NAME, self.lost_devices.record(loading, is_in_use=is_in_use))
        fronts = [self._gate.drain(keeps_sockets=True)] if self._gate is not None else []
        drains = (connections.drain() for connections in self._connections)
        answering = asyncio.gather(self.grpc.drain(), *fronts, *drains)
        await asyncio.wait([answering], timeout=OTHERS_S)
        if not answering.done():
            await self.cut_short()

    async def cut_short(self) -> None:
        """Answers what waits with 503 and lets go of the rest."""
        for model in self.registry.all_models():
            model.cut_short()
        await asyncio.sleep(CUT_SHORT_WRITE_S)  # the answers are written when the loop turns
        for connections in self._connections:
            connections.abort()

    def close(self) -> None:
        self._watch.stop()
        if self._gate is not None:
            self._gate.close()
        if self._renewing is not None:
            self._renewing.cancel()
        if self._measuring is not None:
            self._measuring.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._engine.close()
        if self._services.tracer is not None:
            self._services.tracer.close()


def _metrics_options(config: Config) -> MetricsOptions:
    """Without the declarations of a metrics.yaml that cannot be used, unless the configuration is strict.

    Raises:
        ConfigError: under ``strict``, metrics.yaml cannot be used.
    """
    declared = MetricsConfig()
    if config.metrics_config:
        try:
            declared = read_metrics_config(config.metrics_config)
        except MetricsConfigError as error:
            if config.strict:
                raise ConfigError(str(error)) from None
            log.error("%s; the built-in list of metrics is used", error)
    return MetricsOptions(
        declared, metrics_mode(config), is_strict=config.compat == "strict",
        takes_undeclared=config.model_metrics_auto_detect,
    )  # fmt: skip
