"""Which lane a model runs in: the native one if its handler lets the engine run the network, else the python one."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyserve.archive.archive import Archive
from pyserve.archive.cache import open_cache
from pyserve.archive.manifest import missing_handler
from pyserve.archive.model_config import ModelConfig
from pyserve.conversion.torchscript import NeedsPythonError, Progress, Tracing
from pyserve.devices import index_of
from pyserve.errors import ModelLoadError
from pyserve.lanes.audit import AuditLane
from pyserve.lanes.lane import Lane
from pyserve.lanes.limited_runs import limited_runs
from pyserve.lanes.lost_devices import DeviceLostError
from pyserve.lanes.native import NativeLane
from pyserve.lanes.python import PythonLane
from pyserve.lanes.resources import Services
from pyserve.lanes.restart_policy import RETRY_DEFAULT_S
from pyserve.lanes.sequences import SequenceLane
from pyserve.lanes.settings import ModelSettings
from pyserve.lanes.worker_slot import Condition
from pyserve.models.loader import load_network
from pyserve.models.requirements import prepare_environment
from pyserve.telemetry.server_logs import writes_metrics
from pyserve.worker.handler_choice import built_in_name, python_lane_reason
from pyserve.worker.spec import WorkerSpec

log = logging.getLogger(__name__)


@dataclass
class LaneOptions:
    """Everything needed to open a model's lane.

    Attributes:
        devices: where its workers are to run, in turn: ``["cpu"]`` or names such as ``cuda:0``.
        workers: how many it is to have at first.
        tracing: a conversion of the archive that was started already.
        on_condition: told how the lane's worker processes are, at every change.
        is_over: whether nobody wants the model any more; any thread.
    """

    services: Services
    archive: Archive
    name: str
    devices: list[str]
    settings: ModelSettings
    progress: Progress
    workers: int = 1
    tracing: Tracing | None = None
    on_condition: Callable[[Condition], None] = lambda condition: None
    is_over: Callable[[], bool] = lambda: False

    @property
    def label(self) -> str:
        """As the log has it."""
        return f"{self.name} {self.archive.manifest.model_version}"


async def open_lane(options: LaneOptions) -> Lane:
    """The lane of a model, its weights loaded or its environment prepared, without workers.

    Raises:
        ServeError: it cannot be served; the text says why.
    """
    config, archive = options.services.config, options.archive
    if not archive.manifest.handler:
        raise ModelLoadError(missing_handler(archive.name).message)
    reason = python_lane_reason(archive)
    if reason and built_in_name(archive) is not None:
        archive.check_complete()  # in the native lane once the handler is found
    if not reason and config.service_envelope:
        reason = f"service_envelope={config.service_envelope} wraps its handler"
    if reason:
        return await open_python_lane(options)
    try:
        return await _open_native_lane(options)
    except NeedsPythonError as error:
        reason = error.message
        if options.archive.config.precision not in (None, "fp32"):
            reason += "; it is served in fp32"
        log.warning("%s runs in worker processes, each with a copy of the model: %s", options.label, reason)
        lane = await open_python_lane(options)
        lane.reason = reason
        return lane


async def _open_native_lane(options: LaneOptions) -> NativeLane:
    services = options.services
    load = functools.partial(
        load_network,
        options.archive,
        name=options.name,
        devices=await _working_devices(options),
        workers=options.workers,
        batch_size=options.settings.batch_size,
        cpu_budget=services.engine.cpu_budget,
        limit_max_image_pixels=services.config.limit_max_image_pixels,
        startup_timeout_s=options.settings.startup_timeout_s,
        progress=options.progress,
        tracing=options.tracing,
        backend=services.config.default_backend,
        is_over=options.is_over,
        defers=True,
    )
    network = await limited_runs(
        load, limit_s=options.settings.startup_timeout_s or math.inf, stuck=services.stuck, label=options.label,
        passes=(NeedsPythonError,),
    )  # fmt: skip
    return NativeLane(services, options.name, options.label, network, options.settings)


async def _working_devices(options: LaneOptions) -> list[str]:
    """Those that the model may use, without the ones that are lost or do not answer.

    Raises:
        DeviceLostError: none is left, or it is one that model-config.yaml names.
    """
    working = list(options.devices)
    for device in options.devices[: max(1, options.workers)]:
        try:
            await options.services.lost_devices.check(
                device, options.label, float(options.settings.startup_timeout_s or 1)
            )
        except DeviceLostError as error:
            if options.archive.config.device_ids or len(working) == 1:
                raise
            log.warning("%s; the others are used", error.message)
            working.remove(device)
    return working


async def open_python_lane(options: LaneOptions) -> PythonLane | SequenceLane:
    """The python lane of a model, whatever its handler would allow."""
    spec, interpreter = await _prepare_workers(options)
    config = options.archive.config
    device_ids = [index for each in options.devices if (index := index_of(each)) is not None]
    retry_s = config.retry_timeout_max_s
    named: dict[str, Any] = {
        "device_ids": device_ids,
        "interpreter": interpreter,
        "on_condition": options.on_condition,
        "renew": lambda: _renew_workers(options),
        "retry_s": RETRY_DEFAULT_S if retry_s is None else float(retry_s),
    }
    if config.sequence_batching:
        return SequenceLane(options.services, spec, options.label, options.settings, config, **named)
    return PythonLane(options.services, spec, options.label, options.settings, **named)


async def _renew_workers(options: LaneOptions) -> tuple[WorkerSpec, str | None]:
    """As `_prepare_workers`, with all files that are gone from the disk put back."""
    await asyncio.to_thread(options.archive.own_folder, with_weights=True, completes=True)
    return await _prepare_workers(options)


async def open_audit_lane(options: LaneOptions) -> AuditLane:
    """The lane that runs requests of a model again, on the CPU, without its worker."""
    spec, interpreter = await _prepare_workers(options)
    return AuditLane(options.services, spec, f"{options.label}-audit", options.settings, interpreter=interpreter)


def _is_spread(config: ModelConfig) -> bool:
    """Whether a worker is several processes, or has several devices: ``parallelLevel`` with a ``parallelType``.

    One device of a handler's ``custom`` kind, as vLLM's examples have it, is a worker like any other.
    """
    is_one = config.parallel_type == "custom" and config.parallel_level == 1
    return bool(config.parallel_type and config.parallel_level) and not is_one


async def _prepare_workers(options: LaneOptions) -> tuple[WorkerSpec, str | None]:
    """What worker processes of a model are started with, and their interpreter; None for the server's own."""
    config, archive = options.services.config, options.archive
    interpreter = None
    manifest = archive.manifest
    if archive.config.torchrun is not None or _is_spread(archive.config):
        raise ModelLoadError(
            f"{archive.name}: torchrun and parallelLevel, which spread one worker over several processes, are not "
            "in this version; take them out of model-config.yaml to serve the model in one process per worker"
        )
    if manifest.requirements_file is not None:
        if config.install_py_dep_per_model or archive.config.use_venv:
            interpreter = await asyncio.to_thread(prepare_environment, archive, options.name, options.progress)
        else:
            log.info("%s: %s is not installed; install_py_dep_per_model=true in config.properties does that",
                     options.label, manifest.requirements_file)  # fmt: skip
    options.progress("unpacking its files")
    # Weights of TorchScript models are shared between workers through a file; see pyserve.handlers.
    os.environ.setdefault("PYSERVE_WEIGHTS_CACHE", str(open_cache().root / "weights"))
    spec = await asyncio.to_thread(
        WorkerSpec.of,
        archive,
        name=options.name,
        batch_size=options.settings.batch_size,
        gpu_id=index_of(options.devices[0]),
        decode_input=config.decode_input_request,
        envelope=config.service_envelope or None,
        lenient=config.compat == "strict",
        limit_max_image_pixels=config.limit_max_image_pixels,
        isolate_errors=config.isolate_errors and config.compat != "strict",
        has_side_effects=bool(archive.config.side_effects),
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
