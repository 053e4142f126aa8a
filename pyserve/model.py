"""One served version of a model: its life and its settings.

    LOADING ──> READY ──> DRAINING ──> gone
       └──────> FAILED ──────┘

Loop thread only; loading runs in threads and comes back to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pyserve.archive import Archive
from pyserve.errors import ConflictError, JsonObject, ModelLoadError, ServeError
from pyserve.http1_exchange import Exchange
from pyserve.loader import load_network
from pyserve.model_settings import PARAMETERS, ModelSettings
from pyserve.native_lane import RING_CAPACITY_MIN, NativeLane, no_worker_error
from pyserve.pending import Pending
from pyserve.sample import sample_arguments
from pyserve.services import Services
from pyserve.trace import Progress, Tracing

log = logging.getLogger(__name__)

STATES = {"LOADING": ("READY", "FAILED", "DRAINING"), "READY": ("DRAINING",), "FAILED": ("DRAINING",), "DRAINING": ()}


@dataclass
class WorkerRow:
    """One worker as the management API shows it. ``memory_usage`` is the whole process's, in bytes."""

    id: str
    start_time: datetime
    status: str
    memory_usage: int
    pid: int
    gpu: bool
    gpu_usage: str


class Model:
    """One version.

    Attributes:
        url: the archive's file name.
        device: ``cpu`` or ``cuda:0``.
        state: a key of STATES.
        error: why it FAILED.
        wanted_workers: how many it is to have.
    """

    lane = "native"

    def __init__(
        self, services: Services, archive: Archive, *, name: str, url: str, settings: ModelSettings, device: str,
        handler_name: str | None = None, loaded_at_startup: bool = False,
    ):  # fmt: skip
        # Constant.
        self.name = name
        self.version = archive.manifest.model_version
        self.url = url
        self.runtime = archive.manifest.runtime
        self.archive = archive
        self.handler_name = handler_name
        self.device = device
        self.loaded_at_startup = loaded_at_startup
        self._services = services
        # Changes while it runs.
        self.settings = settings
        self.state = "LOADING"
        self.error = ""
        self.wanted_workers = settings.workers_min
        self._lane: NativeLane | None = None
        self._worker_started: dict[int, datetime] = {}
        self._scaling = asyncio.Lock()
        self._loading = asyncio.Lock()

    # --- life -----------------------------------------------------------------------------------------------------

    async def load(self, workers: int, progress: Progress, tracing: Tracing | None = None) -> None:
        """Loads the network and starts ``workers`` workers; returns when they are warm.

        Raises:
            ServeError: it cannot be served; the state is FAILED then and ``error`` says why.
        """
        async with self._loading:
            await self._load(workers, progress, tracing)

    async def _load(self, workers: int, progress: Progress, tracing: Tracing | None) -> None:
        services = self._services
        try:
            network = await asyncio.to_thread(
                load_network,
                self.archive,
                name=self.name,
                handler_name=self.handler_name,
                device=self.device,
                batch_size=self.settings.batch_size,
                cpu_budget=services.cpu_budget,
                limit_max_image_pixels=services.config.limit_max_image_pixels,
                startup_timeout_s=self.settings.startup_timeout_s,
                progress=progress,
                tracing=tracing,
            )
            self._check_still_loading()
            self._lane = NativeLane(services, self.name, f"{self.name} {self.version}", network, self.settings)
            if workers:
                progress(f"warming up {workers} worker{'s' if workers > 1 else ''}")
            await self.scale(workers, max(workers, self.settings.workers_max))
            self._check_still_loading()
        except Exception as error:
            if not isinstance(error, ServeError):
                log.exception("loading %s %s failed", self.name, self.version)
            self.error = _reason(error)
            if self.state == "LOADING":
                self._move("FAILED")
            await self._close_lane()
            raise
        self._move("READY")
        progress("ready")

    def _check_still_loading(self) -> None:
        if self.state != "LOADING":
            raise ConflictError(f"Model {self.name} version {self.version} was unregistered while it was loading")

    async def drain(self) -> None:
        """Finishes what was admitted, then stops the workers and lets go of the weights. Takes no more requests.

        A load that is under way is waited for: it notices, and gives up.
        """
        if self.state != "DRAINING":
            self._move("DRAINING")
        async with self._loading:
            await self._close_lane()
            self.archive.close()

    def cut_short(self) -> None:
        """Answers what waits with 503; nothing waits for the model any more."""
        if self._lane is not None:
            self._lane.answer_all(self._lane.refusal("draining"))

    async def _close_lane(self) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            await lane.close()

    def _move(self, state: str) -> None:
        if state not in STATES[self.state]:
            raise RuntimeError(f"{self.name} {self.version}: {self.state} cannot become {state}")
        self.state = state

    # --- settings -------------------------------------------------------------------------------------------------

    async def scale(self, workers_min: int, workers_max: int) -> int:
        """Brings the number of workers into [workers_min, workers_max]; returns how many there are then.

        Raises:
            ModelLoadError: a worker cannot be started; the others go on.
        """
        async with self._scaling:
            lane = self._lane
            if lane is None:
                raise self._scaling_error(self.error or "it is being unregistered")
            before = lane.wanted_count
            wanted = min(max(before, workers_min), max(workers_min, workers_max))
            self.settings.workers_min, self.settings.workers_max = workers_min, workers_max
            self.wanted_workers = wanted
            lane.set_workers(wanted)
            for row in lane.core.workers():
                self._worker_started.setdefault(row["id"], datetime.now())
            failure = await lane.settled(self.settings.startup_timeout_s)
            if self._lane is not lane:
                raise self._scaling_error("it is being unregistered")
            if failure:
                self.wanted_workers = min(before, wanted)
                lane.set_workers(self.wanted_workers)
                raise self._scaling_error(failure)
            return wanted

    def _scaling_error(self, text: str) -> ModelLoadError:
        return ModelLoadError(
            f"Failed to start workers for model {self.name} version: {self.version}", detail={"text": text}
        )

    def configure(self, changes: dict[str, int]) -> dict[str, tuple[int, int]]:
        """Applies ``changes`` (keys of PARAMETERS) between two batches. Returns old and new value of each.

        Raises:
            BadRequestError: a value is out of range; nothing was changed.
        """
        capacity = self._lane.core.capacity if self._lane is not None else RING_CAPACITY_MIN
        wanted = self.settings.checked(changes, queue_size_max=capacity)
        changed = {name: (getattr(self.settings, PARAMETERS[name]), value) for name, value in changes.items()}
        for attribute, value in wanted.items():
            setattr(self.settings, attribute, value)
        if self._lane is not None:
            self._lane.apply_limits()
        return changed

    # --- a request ------------------------------------------------------------------------------------------------

    def predict(
        self, exchange: Exchange, url_version: str = "default", extra_headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Sees to the request's answer.

        Args:
            url_version: the version as in the URL, for the metrics.
            extra_headers: what handlers see besides the client's headers.

        Raises:
            OverloadedError: the model is not there yet, or not any more.
        """
        if self._lane is None:
            detail = {"reason": "no worker", "state": self.state}
            if self.error:
                detail |= {"text": self.error, "mend": "mend the archive and register it again"}
            raise no_worker_error(self.name, detail)
        exchange.request.headers.extend(extra_headers)
        self._lane.predict(Pending(self._lane, exchange, self.version, url_version))

    # --- what others ask ------------------------------------------------------------------------------------------

    @property
    def workers_min(self) -> int:
        return self.settings.workers_min

    @property
    def workers_max(self) -> int:
        return self.settings.workers_max

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size

    @property
    def max_batch_delay_ms(self) -> int:
        return self.settings.max_batch_delay_ms

    @property
    def min_batch(self) -> int:
        return self.settings.min_batch

    @property
    def response_timeout_s(self) -> int:
        return self.settings.response_timeout_s

    @property
    def startup_timeout_s(self) -> int:
        return self.settings.startup_timeout_s

    @property
    def queue_size_max(self) -> int:
        return self.settings.queue_size

    @property
    def device_type(self) -> str:
        return "cpu" if self.device == "cpu" else "gpu"

    @property
    def device_ids(self) -> list[int] | None:
        return self.archive.config.device_ids

    @property
    def precision(self) -> str:
        return self.archive.config.precision or "fp32"

    @property
    def weights_size(self) -> int:
        return int(self._lane.network.torch_model.weights_size) if self._lane is not None else 0

    @property
    def has_ready_worker(self) -> bool:
        return self.state == "READY" and self._lane is not None and self._lane.ready_count > 0

    @property
    def requests_in_flight(self) -> int:
        return self._lane.in_flight_count if self._lane is not None else 0

    def worker_rows(self) -> list[WorkerRow]:
        memory = _resident_size()
        return [
            WorkerRow(
                id=str(row["id"]),
                start_time=self._worker_started.get(row["id"], datetime.now()),
                status="READY" if row["state"] == "ready" else "UNLOADING",
                memory_usage=memory,
                pid=os.getpid(),
                gpu=self.device != "cpu",
                gpu_usage="N/A",
            )
            for row in (self._lane.core.workers() if self._lane is not None else ())
        ]

    def queue_status(self) -> tuple[int, int]:
        """(remaining capacity, waiting requests)."""
        waiting = self._lane.waiting_count if self._lane is not None else 0
        return max(0, self.settings.queue_size - waiting), waiting

    def stats(self) -> JsonObject:
        """The native counters and histograms; empty while there is no lane."""
        return self._lane.stats() if self._lane is not None else {}

    def sample_arguments(self, folder: Path) -> str:
        """Arguments of a curl call that sends something this model understands; the file is put into ``folder``.

        REQUIRES: state is READY.
        """
        assert self._lane is not None
        network = self._lane.network
        return sample_arguments(self.name, network.handler, network.example[0], folder)


def _reason(error: BaseException) -> str:
    if isinstance(error, ServeError):
        return str(error.detail.get("text", error.message))
    return f"{type(error).__name__}: {error}"


def _resident_size() -> int:
    """Bytes of this process's memory that are in RAM."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
