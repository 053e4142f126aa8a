"""Everything one server process serves with: engine, models, endpoints and listeners, wired together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyserve.api import openapi
from pyserve.api.checks import protected, rotation_routes
from pyserve.api.coded_bodies import CodedBodies
from pyserve.api.console import Console
from pyserve.api.console_state import ConsoleState
from pyserve.api.inference import Inference
from pyserve.api.kserve import KServe
from pyserve.api.management import Management
from pyserve.api.model_repository import ModelRepository
from pyserve.api.openapi_live import document_rows
from pyserve.api.routes import Router, RouteRow, inference_descriptions, metrics_routes
from pyserve.api.signposts import Signposts
from pyserve.api.triton_extensions import TritonExtensions
from pyserve.archive.archive import Archive
from pyserve.config.model_source import ModelSource
from pyserve.conversion.torchscript import Tracing
from pyserve.cpu_budget import cpu_budget
from pyserve.engine import Engine
from pyserve.errors import JsonObject, ServeError
from pyserve.fronts.fast_path import protocol_maker
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
from pyserve.lanes.loop_guard import LoopGuard
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
from pyserve.security.tokens import Scope, Tokens
from pyserve.server.handover import ServerStart
from pyserve.server.last_clients import accept_last, file_identities
from pyserve.server.start_table import start_table
from pyserve.telemetry.device_metrics import loss_family
from pyserve.telemetry.loop_watch import LoopWatch
from pyserve.telemetry.metrics import Metrics
from pyserve.telemetry.metrics_options import metrics_options
from pyserve.telemetry.server_logs import Logs
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

    def __init__(self, start: ServerStart, spawner: Spawner, logs: Logs):
        config = start.config
        budget = cpu_budget(config.cpu_budget)
        # Preprocessing runs on threads of its own, one per CPU; torch must not multiply them.
        prepare: Callable[[], object] = partial(torch.set_num_threads, 1)  # of the thread that calls it
        if not start.is_embedded:
            prepare()
            prepare = torch.get_num_threads
        restore_certificate(config)
        self._start = start
        self._logs = logs
        self.metrics = Metrics(torch_version=torch.__version__, options=metrics_options(config), log=logs.metrics)
        self._measuring: asyncio.Task[None] | None = None
        self._engine = Engine(asyncio.get_running_loop(), budget)
        stuck = StuckThreads(stuck_max(config.stuck_threads_max, budget), lambda: self._engine.lost_count)
        # A thread takes over torch's number of threads when it first asks for it, and the workers will change that
        # number for all who ask later; so every thread of the pool asks now.
        self._pool = PreprocessPool(config.preprocess_threads or budget, stuck, prepare)
        self.lost_devices = LostDevices(
            start.kept.get(LOSSES_NAME), self._engine.core.probe_device, losses_max=config.device_losses_max
        )
        self._engine.watch(self._look_at_devices)
        self._services = services = Services(
            config=config,
            engine=self._engine,
            metrics=self.metrics,
            preprocess_pool=self._pool,
            spawner=spawner,
            tokens=Tokens.in_memory(config) if start.is_embedded else Tokens.open(config, start.kept, Path.cwd()),
            tracer=open_tracer(),
            descriptors=DescriptorLimit(open_files_max()),
            stuck=stuck,
            lost_devices=self.lost_devices,
            error_format=error_format(config),
            loop_guard=LoopGuard(is_on=not start.is_embedded),
        )
        self.stuck = stuck
        self.registry = Registry(
            services,
            keep_state=lambda content: start.kept.put(STATE_NAME, content),
            snapshots=None if config.no_config_snapshots else SnapshotFolder(snapshot_folder(), config),
            progress=start.report.progress,
        )
        self.metrics.models = self.registry.all_models
        shares = Shares.of(config) if start.fronts else None
        # A request of the size that is allowed is never one too many.
        whole = max(Http1Limits().body_budget_size, config.max_request_size)
        self.bodies = BodyBudget(whole) if shares is None else shares.new_budget()
        is_strict = config.compat == "strict"
        self._inference = Inference(
            self.registry,
            CodedBodies(config.max_request_size, self.bodies, self._pool, is_on=not is_strict),
            tells_errors=services.error_format.with_private_detail,
            lenient=is_strict,
        )
        self._compression = new_compression(config, self._pool)
        self._managed = self.registry
        self._repository = ModelRepository(
            self.registry, config, tells_errors=services.error_format.with_private_detail, tokens=services.tokens
        )
        self.grpc = GrpcFrontEnd(config, start.restart, is_successor=start.is_successor)
        self._has_successor = False
        self._servers: list[asyncio.AbstractServer] = []
        self._files = file_identities(start.sockets.values())
        self._connections: list[Connections] = []
        self._gate = self._new_gate(start, shares) if start.fronts and shares is not None else None
        self._tls: ssl.SSLContext | None = None
        self._renewing: asyncio.Future[None] | None = None
        self._watch = LoopWatch()
        self.metrics.more.append(self._watch.families)
        self.metrics.more.append(lambda: [loss_family(services.lost_devices.counts())])
        log.info("%d CPUs for %d preprocessing threads and the workers of all models", budget,
                 config.preprocess_threads or budget)  # fmt: skip

    def _new_gate(self, start: ServerStart, shares: Shares) -> Gate:
        from pyserve.fronts.gate import Gate  # not above: without front ends nothing of it is needed
        from pyserve.fronts.shared_budget import SharedBudget
        from pyserve.fronts.tensors import Tensors

        assert start.fronts is not None and isinstance(self.bodies, SharedBudget)
        config, services = start.config, self._services
        gate = Gate(Meeting.of_engine(start.fronts), config.front_ends, shares, self.bodies, services.error_format)
        gate.tensors = Tensors(
            self.registry, self._engine.core, decodes=config.decode_input_request, tokens=services.tokens
        )
        self.metrics.refused.append(gate.refused)
        self.metrics.more.append(gate.families)
        return gate

    async def load(
        self,
        sources: Sequence[ModelSource],
        archives: dict[str, Archive | ServeError],
        tracings: dict[str, Tracing],
        state: JsonObject | None,
    ) -> None:
        """Loads what the server is started with, or what the one before it, or a snapshot, says was served.

        Meanwhile gRPC takes its ports, unless another server has them.
        """
        binding = asyncio.ensure_future(self.grpc.bind() if not self._start.is_successor else asyncio.sleep(0))
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
        if self._start.is_successor:
            await self.grpc.bind()
        listeners = grouped(self._start.sockets)
        if self._gate is not None:
            for sock, _ in listeners:
                sock.close()  # the front ends have theirs
            self._inference.is_ready = True  # before the first request comes
            await self._gate.open([self.router(names) for _, names in listeners])
        else:
            for sock, names in listeners:
                await self._listen(sock, names)
        all_watched = watched(self._start.config, self._tls, self._services.tokens)
        self._renewing = asyncio.ensure_future(keep_renewed(all_watched))
        if not config.disable_system_metrics:
            system = SystemMetrics(
                self.metrics.host, config.metric_time_interval, command=config.system_metrics_cmd,
                gpus=gpu_count(config.number_of_gpu),
            )  # fmt: skip
            self._measuring = asyncio.ensure_future(system.run())
        self._watch.start()
        self._inference.is_ready = True
        await self.grpc.open(
            self._services, self.registry, self._inference, self.bodies, self._logs.access, repository=self._repository
        )

    def router(self, names: list[str], *, is_trusted: bool = False) -> Router:
        """What answers the requests of a listener.

        Args:
            names: of the APIs that it has: ``inference``, ``management``, ``metrics``.
            is_trusted: the caller is this process itself: no call needs a key, and models may be registered.
        """
        tokens = self._services.tokens
        # As by GET /v1/models.
        may_list = "inference" in names and (tokens is None or not tokens.guards("inference"))
        signposts = Signposts(
            self._start.config, names,
            tells_addresses=self._services.error_format.with_private_detail and not self._start.is_embedded,
            models=(lambda: [model.name for model in self.registry.default_models()]) if may_list else None,
        )  # fmt: skip
        return Router(
            self._rows(names, is_trusted=is_trusted),
            signposts=signposts,
            error_format=self._services.error_format,
            cors=Cors(self._start.config),
            on_answer=self.metrics.observe_answer,
            on_error=self._services.recent_errors.note,
        )

    def new_connections(self, names: list[str]) -> Connections:
        """What the connections of a listener have in common; see `router`."""
        config, services = self._start.config, self._services
        connections = new_connections(
            config, names, config.connection_count_max, self.bodies, services.descriptors, services.error_format,
            self._compression,
        )  # fmt: skip
        self._connections.append(connections)
        connections.on_answer = self._logs.access.observe_http
        self.metrics.refused.append(connections.refused)
        return connections

    async def _listen(self, sock: Any, names: list[str]) -> None:
        config = self._start.config
        connections = self.new_connections(names)
        if "inference" in names:
            warn_of_few_descriptors(config.connection_count_max, self._services.descriptors)
        router = self.router(names)
        if config.addresses()[names[0]].is_tls and self._tls is None:
            self._tls = server_context(config)
        context = self._tls if config.addresses()[names[0]].is_tls else None
        make = protocol_maker(
            self.registry, self._engine, config, connections, router, self._logs.access, self._services.tokens,
            is_tls=context is not None, predicts="inference" in names,
        )  # fmt: skip
        loop = asyncio.get_running_loop()
        self._servers.append(await loop.create_server(make, sock=sock, backlog=ACCEPT_BACKLOG, **tls_options(context)))

    def _rows(self, names: list[str], *, is_trusted: bool) -> list[RouteRow]:
        """What the listener of ``names`` answers. Each path has the checks of its own API, also where all share one."""
        config, tokens = self._start.config, self._services.tokens
        if is_trusted:
            config, tokens = replace(config, enable_model_api=True), None
        rows: list[RouteRow] = []
        documents: list[Callable[[], JsonObject]] = []
        kserve = KServe(
            self.registry, self._inference, self.metrics, config.max_response_size,
            is_strict=config.compat == "strict", error_format=self._services.error_format,
        )  # fmt: skip
        triton = TritonExtensions(self.registry, self._repository, config, has_ports=not self._start.is_embedded)
        origins = allowed_origins(config)
        has_control = config.model_control_on_inference
        reading = [*kserve.reading_routes(), *triton.reading_routes(), triton.index_route(shows_store=True)]
        if "inference" in names:
            shows_store = has_control or "management" in names
            inference = [*self._inference.routes(), *kserve.routes(), *triton.reading_routes()]
            inference.append(triton.index_route(shows_store=shows_store))
            refused = triton.refused_routes(has_control=shows_store)
            control = triton.control_routes() if has_control and "management" not in names else []
            described = inference_descriptions([*inference, *control], self.registry.get)
            patterns = [pattern for _, pattern, _ in (*inference, *control)]
            documents.append(partial(openapi.inference_api, [*patterns, "/", "/api-description"]))
            managed = {"/v1/models/{model_name}", *(row[1] for row in reading)} if "management" in names else ()
            rows += protected([*inference, *refused, *described], tokens, "inference", managed=managed)
            rows += protected(control, tokens, "management", BrowserGuard(config.inference_address, origins))
        if "management" in names:
            tells_errors = self._services.error_format.with_private_detail
            guard = BrowserGuard(config.management_address, origins)
            rotation = rotation_routes(tokens, self.registry.changes)
            control = triton.control_routes()
            if "inference" not in names:
                control += reading
            neighbours = [pattern for _, pattern, _ in (*rotation, *control)]
            management = Management(self._managed, config, tells_errors=tells_errors, neighbours=neighbours)
            documents.append(management.document)
            rows += protected([*management.routes(), *control], tokens, "management", guard)
            rows += protected(rotation, None, "api", guard)
        # By DNS rebinding a page of any site could read them, too.
        metrics = protected(metrics_routes(self.metrics), None, "inference", BrowserGuard(config.metrics_address))
        if names == ["metrics"]:
            rows += metrics
            documents.append(openapi.metrics_api)
        elif "metrics" in names or (len(names) > 1 and config.enable_metrics_api):  # as SageMaker has them, on one port
            rows += metrics[2:]
            documents.append(openapi.metrics_api)
        return [
            *self._console_rows(names, rows),
            *document_rows(names, documents, config, tokens, self.registry),
            *rows,
        ]

    def _console_rows(self, names: list[str], rows: list[RouteRow]) -> list[RouteRow]:
        """The page for browsers, where there is one; what it shows is under the key of the listener's API."""
        config, services = self._start.config, self._services
        is_management = "management" in names
        if not config.has_console or not (is_management or "inference" in names):
            return []
        serves_both = is_management and "inference" in names
        # Who has management's key may read in the log whatever an answer on a public address does not quote.
        is_keyed = (
            config.error_detail != "none" and services.tokens is not None and services.tokens.guards("management")
        )
        state = ConsoleState(
            self.registry, self.metrics, self._inference, config, errors=services.recent_errors,
            log=self._logs.recent, is_management=is_management, serves_both=serves_both,
            tells_errors=services.error_format.with_private_detail or (is_management and is_keyed),
            asks_key=services.tokens is not None and not set(services.tokens.guarded).isdisjoint(names),
        )  # fmt: skip
        guards = [BrowserGuard(config.management_address, allowed_origins(config))] if is_management else []
        scope: Scope = "management" if is_management else "inference"
        page = Console(scope, serves_both=serves_both)
        return protected([*state.routes(), *page.routes(rows)], services.tokens, scope, *guards)

    async def report(self) -> dict[str, Any]:
        """What the start-up table shows, see `start_table`."""
        return await start_table(self._start.config, self.registry, self.grpc, self._services.tokens)

    @property
    def keys(self) -> dict[Scope, str]:
        """The keys that callers show, by API; empty if no call needs one."""
        return {} if self._services.tokens is None else self._services.tokens.keys

    def join_cluster(self, registry: Any) -> Callable[[int], None]:
        """Has management calls from outside go to what stands for the registry, before the first `router` of theirs.
        What is returned is told the generation of what the cluster serves, which ``/ready`` says."""  # fmt: skip
        self._managed = self._repository.registry = registry
        return partial(setattr, self._inference, "generation")

    def part(self) -> None:
        """Says that the server goes: its health is off, and each answer is its connection's last. All is answered."""
        if not self._has_successor:
            self._inference.is_ready = False
        if self._gate is not None:
            self._gate.part()
        for connections in self._connections:
            connections.part()

    async def hold(self) -> None:
        """Refuses changes of models and keys; reports when none is under way, and what is FAILED."""
        await self.registry.changes.hold()
        if self.registry.changes.are_held:
            models = self.registry.all_models()
            failed = [[model.name, model.version] for model in models if model.state == "FAILED"]
            self._start.report.send("held", failed=failed, models=[[model.name, model.version] for model in models])

    async def release(self) -> None:
        """Takes changes again: nothing has come of what they were held for."""
        self.registry.changes.release()
        await self.registry.changed()

    def give_way(self) -> None:
        """Another server accepts on the same sockets: this one does no more. What it has is answered, each answer its
        connection's last. Health stays as it is, since its clients are to stay, too.
        """
        self._has_successor = True
        self._close_listeners()
        self.part()

    def _close_listeners(self) -> None:
        """Clients who connect from now on are another process's, perhaps one that is yet to come."""
        for server in self._servers:
            server.close()
        if self._gate is not None:
            self._gate.close_doors()

    async def drain(self, *, keeps_sockets: bool = False) -> None:
        """In this order: no new connections, answer what was accepted, stop the models.

        Args:
            keeps_sockets: whoever connects from now on waits for the process that takes this one's place.
        """
        self.part()
        self.registry.stop_fetching()
        if self._start.keeps_sockets:
            self._close_listeners()
        if self._gate is not None:
            keeps_front_ends = keeps_sockets and not self._has_successor
            await asyncio.gather(self.grpc.drain(), self._gate.drain(keeps_sockets=keeps_front_ends))
        else:
            if not (keeps_sockets or self._start.keeps_sockets or self._has_successor):
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
