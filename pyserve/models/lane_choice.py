"""Which lane a model runs in: the native one if its handler lets the engine run the network, else the python one."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyserve.archive.archive import Archive
from pyserve.archive.cache import open_cache
from pyserve.conversion.torchscript import NeedsPythonError, Progress, Tracing
from pyserve.errors import ModelLoadError
from pyserve.lanes.audit import AuditLane
from pyserve.lanes.lane import Lane
from pyserve.lanes.native import NativeLane
from pyserve.lanes.python import PythonLane
from pyserve.lanes.resources import Services
from pyserve.lanes.sequences import SequenceLane
from pyserve.lanes.settings import ModelSettings
from pyserve.models.loader import load_network
from pyserve.models.placement import gpu_count
from pyserve.models.requirements import prepare_environment
from pyserve.telemetry.server_logs import writes_metrics
from pyserve.worker.handler_choice import python_lane_reason
from pyserve.worker.spec import WorkerSpec

log = logging.getLogger(__name__)


@dataclass
class Wish:
    """Everything needed to open a model's lane.

    Attributes:
        handler_name: in place of the manifest's; None for that one.
        device: ``cpu`` or ``cuda:0``.
        tracing: a conversion of the archive that was started already.
        on_trouble: told why there is no worker and none is coming, and ``""`` when there is one again.
    """

    services: Services
    archive: Archive
    name: str
    handler_name: str | None
    device: str
    settings: ModelSettings
    progress: Progress
    tracing: Tracing | None = None
    on_trouble: Callable[[str], None] = lambda text: None

    @property
    def label(self) -> str:
        """As the log has it."""
        return f"{self.name} {self.archive.manifest.model_version}"


async def open_lane(wish: Wish) -> Lane:
    """The lane of a model, its weights loaded or its environment prepared, without workers.

    Raises:
        ServeError: it cannot be served; the text says why.
    """
    config = wish.services.config
    reason = python_lane_reason(wish.archive, wish.handler_name or config.default_service_handler or None)
    if not reason and config.service_envelope:
        reason = f"service_envelope={config.service_envelope} wraps its handler"
    if reason:
        return await open_python_lane(wish)
    try:
        return await _open_native_lane(wish)
    except NeedsPythonError as error:
        reason = error.message
        if wish.archive.config.precision not in (None, "fp32"):
            reason += "; it is served in fp32"
        log.warning("%s runs in worker processes, each with a copy of the model: %s", wish.label, reason)
        lane = await open_python_lane(wish)
        lane.reason = reason
        return lane


async def _open_native_lane(wish: Wish) -> NativeLane:
    services = wish.services
    network = await asyncio.to_thread(
        load_network,
        wish.archive,
        name=wish.name,
        handler_name=wish.handler_name,
        device=wish.device,
        batch_size=wish.settings.batch_size,
        cpu_budget=services.engine.cpu_budget,
        limit_max_image_pixels=services.config.limit_max_image_pixels,
        startup_timeout_s=wish.settings.startup_timeout_s,
        progress=wish.progress,
        tracing=wish.tracing,
    )
    return NativeLane(services, wish.name, wish.label, network, wish.settings)


async def open_python_lane(wish: Wish) -> PythonLane | SequenceLane:
    """The python lane of a model, whatever its handler would allow."""
    spec, interpreter = await _prepare_workers(wish)
    device_ids = (
        []
        if spec.gpu_id is None
        else wish.archive.config.device_ids or list(range(gpu_count(wish.services.config.number_of_gpu)))
    )
    options: dict[str, Any] = {
        "device_ids": device_ids, "interpreter": interpreter, "on_trouble": wish.on_trouble
    }  # fmt: skip
    if wish.archive.config.sequence_batching:
        return SequenceLane(wish.services, spec, wish.label, wish.settings, wish.archive.config, **options)
    return PythonLane(wish.services, spec, wish.label, wish.settings, **options)


async def open_audit_lane(wish: Wish) -> AuditLane:
    """The lane that runs requests of a model again, on the CPU, without its worker."""
    spec, interpreter = await _prepare_workers(wish)
    return AuditLane(wish.services, spec, f"{wish.label}-audit", wish.settings, interpreter=interpreter)


async def _prepare_workers(wish: Wish) -> tuple[WorkerSpec, str | None]:
    """What worker processes of a model are started with, and their interpreter; None for the server's own."""
    config = wish.services.config
    interpreter = None
    manifest = wish.archive.manifest
    if wish.archive.config.torchrun is not None or wish.archive.config.parallel_level:
        raise ModelLoadError(
            f"{wish.archive.name}: torchrun and parallelLevel, which spread one worker over several processes, are not "
            "in this version; take them out of model-config.yaml to serve the model in one process per worker"
        )
    if manifest.requirements_file is not None:
        if config.install_py_dep_per_model or wish.archive.config.use_venv:
            interpreter = await asyncio.to_thread(prepare_environment, wish.archive, wish.name, wish.progress)
        else:
            log.info("%s: %s is not installed; install_py_dep_per_model=true in config.properties does that",
                     wish.label, manifest.requirements_file)  # fmt: skip
    wish.progress("unpacking the weights")
    # Weights of TorchScript models are shared between workers through a file; see pyserve.handlers.
    os.environ.setdefault("PYSERVE_WEIGHTS_CACHE", str(open_cache().root / "weights"))
    spec = await asyncio.to_thread(
        WorkerSpec.of,
        wish.archive,
        name=wish.name,
        handler=wish.handler_name or manifest.handler or config.default_service_handler,
        batch_size=wish.settings.batch_size,
        gpu_id=None if wish.device == "cpu" else int(wish.device.partition(":")[2]),
        decode_input=config.decode_input_request,
        envelope=config.service_envelope or None,
        lenient=config.compat == "strict",
        limit_max_image_pixels=config.limit_max_image_pixels,
        isolate_errors=config.isolate_errors and config.compat != "strict",
        nan_as_null=config.compat != "strict",
        max_response_size=config.max_response_size,
        header_keys=(
            config.ts_header_key_sequence_id,
            config.ts_header_key_sequence_start,
            config.ts_header_key_sequence_end,
        ),
        metrics_config=config.metrics_file(),
        keeps_each_metric=writes_metrics(config),
        watch=config.watch,
    )
    return spec, interpreter
