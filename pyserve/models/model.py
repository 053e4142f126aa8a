"""One served version of a model: its life and its settings.

    LOADING ──> READY ──> DRAINING ──> gone
       │        │  ^         │
       └──────> FAILED ──────┘       (back to READY when a worker is there again)

Loop thread only; loading runs in threads and comes back to it.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from pyserve.archive.archive import Archive
from pyserve.conversion.torchscript import Progress, Tracing
from pyserve.devices import CPU, is_used
from pyserve.errors import ConflictError, JsonObject, ModelLoadError, OutOfMemoryError, ServeError
from pyserve.lanes.audit import Repetition
from pyserve.lanes.describe import SelfDescription, ask_handler
from pyserve.lanes.engine_lane import RING_CAPACITY_MIN
from pyserve.lanes.front_rows import RowsLane
from pyserve.lanes.lane import Lane
from pyserve.lanes.limited_runs import EndlessError
from pyserve.lanes.lost_devices import DeviceLoss
from pyserve.lanes.native import NativeLane
from pyserve.lanes.network import Network
from pyserve.lanes.pending import Pending
from pyserve.lanes.refusals import no_worker_error
from pyserve.lanes.resources import Services
from pyserve.lanes.settings import PARAMETERS, ModelSettings
from pyserve.lanes.worker_rows import WorkerRow, with_coming
from pyserve.lanes.worker_slot import IDLE, SERVING, Condition
from pyserve.models.absence import absence
from pyserve.models.audit import Audit
from pyserve.models.audit_choice import audit_of
from pyserve.models.checks import checks_of
from pyserve.models.engine_choice import EngineChoice
from pyserve.models.explanations import Explanations
from pyserve.models.lane_choice import LaneOptions, open_lane
from pyserve.models.model_devices import ModelDevices
from pyserve.models.sample import arguments_for
from pyserve.request.exchange import Exchange
from pyserve.telemetry.stage_times import StageTimes
from pyserve.worker.handler_choice import built_in_name

log = logging.getLogger(__name__)

STATES = {
    "LOADING": ("READY", "FAILED", "DRAINING"),
    "READY": ("FAILED", "DRAINING"),
    "FAILED": ("READY", "DRAINING"),
    "DRAINING": (),
}
EXPLAIN_HEADER = ("explain", "True")


class Model(ModelDevices):
    """One version.

    Attributes:
        url: the archive's file name.
        state: a key of STATES.
        error: why it FAILED.
        endless: that a forward did not come to an end while it was loaded; ``""`` else. Loading it again would get
            another thread stuck.
        note: what is to be known of how it was loaded; ``""`` for nothing.
        wanted_workers: how many it is to have.
        starts_first_workers: it has had none, and some are being started.
    """

    def __init__(
        self, services: Services, archive: Archive, *, name: str, url: str, settings: ModelSettings,
        devices: list[str], handler_name: str | None = None, loaded_at_startup: bool = False,
    ):  # fmt: skip
        # Constant.
        self.name = name
        self.version = archive.manifest.model_version
        self.url = url
        self.runtime = archive.manifest.runtime
        self.archive = archive
        self.handler_name = handler_name
        self.devices = devices
        self.loaded_at_startup = loaded_at_startup
        self._services = services
        self._registered_at = datetime.now()
        # Changes while it runs.
        self.settings = settings
        self.state = "LOADING"
        self.error = self.endless = self.note = ""
        self.wanted_workers = settings.workers_min
        self.starts_first_workers = False
        # Its name, if the server may speak protocols for it; None of a handler that answers for itself.
        self.built_in_handler: str | None = None
        self._lane: Lane | None = None
        self._explanations = Explanations(
            lambda: self._lane_options(lambda text: None),
            is_served=lambda: self._lane is not None,
            no_worker=lambda: no_worker_error(self.name, absence(self.state, self.error, self._services.error_format)),
            starting_error=self.starting_error,
        )
        self._audit: Audit | None = None  # most models have none
        self._engine_choice: EngineChoice | None = None  # of a native lane
        self._scaling, self._loading = asyncio.Lock(), asyncio.Lock()

    # --- life -----------------------------------------------------------------------------------------------------

    async def load(self, workers: int, progress: Progress, tracing: Tracing | None = None) -> None:
        """Loads the network and starts ``workers`` workers; returns when they are warm.

        One that FAILED may be tried again.

        Raises:
            ServeError: it cannot be served; the state is FAILED then and ``error`` says why.
        """
        async with self._loading:
            await self._load(workers, progress, tracing)

    async def _load(self, workers: int, progress: Progress, tracing: Tracing | None) -> None:
        try:
            lane = await open_lane(replace(self._lane_options(progress, tracing), workers=workers))
            if isinstance(lane, NativeLane):
                self.devices = lane.network.devices
            self.built_in_handler = None if self._services.config.service_envelope else built_in_name(self.archive)
            self._lane = lane
            if isinstance(lane, RowsLane):
                lane.served_as = weakref.ref(self)
            self._audit = audit_of(self._lane_options(lambda text: None), lane)
            self._check_still_loading()
            if workers:
                progress(f"starting {workers} worker{'s' if workers > 1 else ''}")
            await self.scale(workers, max(workers, self.settings.workers_max))
            self._check_still_loading()
        except Exception as error:
            if not isinstance(error, ServeError):
                log.exception("loading %s %s failed", self.name, self.version)
            self.error = error.reason() if isinstance(error, ServeError) else f"{type(error).__name__}: {error}"
            if isinstance(error, EndlessError) and self.device == CPU:
                self.endless = error.message
            for device in self.resident.devices if is_used() else ():
                await self._services.lost_devices.look(device, f"{self.name} {self.version}", error, self.error)
            if self.state in ("LOADING", "READY"):  # the latter while it was tried again
                self._move("FAILED")
            await self._close_lane()
            raise
        if self.state != "READY":
            self._move("READY")
        self.error = ""
        log.info("%s %s: loaded from %s; its files are in %s", self.name, self.version, self.archive.path,
                 self.archive.served_dir)  # fmt: skip
        self._choose_engine(lane)
        self._on_condition(lane.condition)  # it may have changed since
        progress("ready")

    def _choose_engine(self, lane: Lane) -> None:
        """Behind its first requests. A model that has no worker waits with it until it has one."""
        if isinstance(lane, NativeLane) and lane.wanted_count and self.state == "READY":
            self._engine_choice = self._engine_choice or EngineChoice(self._services, self.archive, lane)
            self._engine_choice.start()

    @property
    def is_loading(self) -> bool:
        return self._loading.locked()

    def fail(self, endless: str) -> None:
        """It is not to be loaded, since that did not come to an end in another process."""
        self.error = self.endless = endless
        self._move("FAILED")

    def _lane_options(self, progress: Progress, tracing: Tracing | None = None) -> LaneOptions:
        return LaneOptions(
            self._services, self.archive, self.name, self.devices, self.settings, progress,
            tracing=tracing, on_condition=self._on_condition, is_over=lambda: self.state == "DRAINING",
        )  # fmt: skip

    def _on_condition(self, condition: Condition) -> None:
        """The lane has no worker, or has one again."""
        if self._lane is None or self.state not in ("READY", "FAILED"):
            return  # also of a lane that is being closed: it has no workers because it could not be loaded
        if condition.error:
            self.error = condition.error
            if self.state == "READY":
                self._move("FAILED")
        elif self.state == "FAILED" and condition.state in (SERVING, IDLE):
            self.error = ""
            self._move("READY")

    def _check_still_loading(self) -> None:
        if self.state == "DRAINING":
            raise ConflictError(f"Model {self.name} version {self.version} was unregistered while it was loading")

    async def loaded(self) -> None:
        """Returns when it is not LOADING any more."""
        async with self._loading:
            pass

    async def drain(self) -> None:
        """Finishes what was admitted, then stops the workers and lets go of the weights. Takes no more requests.

        A load that is under way is waited for: it notices, and gives up; workers that are starting are ended.
        """
        if self._loading.locked() and self._lane is not None:
            self._lane.set_workers(0)
        if self.state != "DRAINING":
            self._move("DRAINING")
        async with self._loading:
            await self._close_lane()
            await asyncio.to_thread(self.archive.close)  # which removes its folder

    def lose_device(self, loss: DeviceLoss) -> None:
        """A device is lost: whoever waits for it is answered."""
        for lane in (self._lane, self._explanations.lane):
            if lane is not None:
                lane.lose_device(loss)

    def cut_short(self) -> None:
        """Answers what waits with 503; nothing waits for the model any more."""
        for lane in (self._lane, self._explanations.lane):
            if lane is not None:
                lane.answer_all(lane.refusal("draining"))

    async def _close_lane(self) -> None:
        choice, self._engine_choice = self._engine_choice, None
        if choice is not None:
            await choice.stop()
        lanes = (self._lane, self._explanations.take_lane())
        self._lane = None
        closing = [lane.close() for lane in lanes if lane is not None]
        if self._audit is not None:
            closing.append(self._audit.stop())
        await asyncio.gather(*closing)

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
        if self._scaling.locked() and self._lane is not None and workers_max < self._lane.wanted_count:
            self._lane.set_workers(max(workers_min, workers_max))  # nobody need wait until the others have started
        async with self._scaling:
            lane = self._lane
            if lane is None:
                raise self.starting_error(self.error or "it is being unregistered")
            before, wanted_before = lane.wanted_count, self.wanted_workers
            bounds_before = self.settings.workers_min, self.settings.workers_max
            wanted = min(max(before, workers_min), max(workers_min, workers_max))
            await self._prepare(lane, wanted)
            self.settings.workers_min, self.settings.workers_max = workers_min, workers_max
            self.wanted_workers = wanted
            lane.set_workers(wanted)
            if not wanted:
                lane.answer_waiting(lane.refusal("no worker"))
            self.starts_first_workers = not before
            try:
                failure = await self._settled(lane, starts=wanted > before)
            finally:
                self.starts_first_workers = False
            if self._lane is not lane:
                raise self.starting_error("it is being unregistered")
            if not wanted and self._audit is not None:
                await self._audit.stop()
            if failure:
                error = self.starting_error(failure, lane.failure)
                error.may_pass = not getattr(lane.failure, "repeats", False)
                error.__cause__ = lane.failure
                self.settings.workers_min, self.settings.workers_max = bounds_before
                self.wanted_workers = wanted_before
                if before < wanted:
                    lane.set_workers(before)
                raise error
            self._choose_engine(lane)
            return wanted

    @property
    def is_scaling(self) -> bool:
        """Whether workers are started or stopped because somebody asked for another number of them."""
        return self._scaling.locked()

    async def _prepare(self, lane: Lane, workers: int) -> None:
        try:
            await lane.prepare_workers(workers)
        except (ModelLoadError, OutOfMemoryError) as error:
            raise self.starting_error(error.message, error) from error
        if self._lane is not lane:
            raise self.starting_error("it is being unregistered")

    async def _settled(self, lane: Lane, *, starts: bool) -> str:
        timeout_s = self.settings.startup_timeout_s
        if starts and not timeout_s:  # which only compat=strict lets through
            return "no worker is ready within startup_timeout=0 s"
        return await lane.settled(timeout_s)

    def starting_error(self, text: str, cause: ServeError | None = None) -> ModelLoadError | OutOfMemoryError:
        """In TorchServe's words, whatever the reason is that there is no worker."""
        message = f"Failed to start workers for model {self.name} version: {self.version}"
        detail = cause.detail if cause is not None and cause.detail else {"text": text}
        return (OutOfMemoryError if isinstance(cause, OutOfMemoryError) else ModelLoadError)(message, detail=detail)

    def configure(self, changes: dict[str, int]) -> dict[str, tuple[int, int]]:
        """Applies ``changes`` (keys of PARAMETERS) between two batches. Returns old and new value of each.

        Raises:
            BadRequestError: a value is out of range; nothing was changed.
        """
        capacity = self._lane.capacity if self._lane is not None else RING_CAPACITY_MIN
        wanted = self.settings.checked(changes, queue_size_max=capacity)
        changed = {name: (getattr(self.settings, PARAMETERS[name]), value) for name, value in changes.items()}
        for attribute, value in wanted.items():
            setattr(self.settings, attribute, value)
        if self._lane is not None:
            if isinstance(self._lane, NativeLane) and "batch_size" in changes:
                self._lane.ceiling.forget()
            self._lane.apply_limits()
        return changed

    def take_back(self, changed: dict[str, tuple[int, int]]) -> None:
        """Undoes a `configure` that returned ``changed``, except for what was changed again since."""
        now = {name: getattr(self.settings, PARAMETERS[name]) for name in changed}
        for name, (old, new) in changed.items():
            if now[name] == new:
                setattr(self.settings, PARAMETERS[name], old)
        self.settings.min_batch = min(self.settings.min_batch, self.settings.batch_size)
        if self._lane is not None:
            self._lane.apply_limits()

    # --- a request ------------------------------------------------------------------------------------------------

    def predict(
        self, exchange: Exchange, url_version: str = "default", *, explains: bool = False,
        query_is_input: bool = False, flags: int = 0,
    ) -> None:  # fmt: skip
        """Sees to the request's answer.

        Args:
            url_version: the version as in the URL, for the metrics and the text of a refusal.
            explains: an explanation is wanted.
            query_is_input: whether the query's parameters are inputs of the handler.
            flags: of the item, as a worker process sees them.

        Raises:
            OverloadedError: the model is not there yet, or not any more.
        """
        lane = self._lane if exchange.kept is None else exchange.kept.lane
        if lane is None:
            raise no_worker_error(
                self.name, absence(self.state, self.error, self._services.error_format), url_version=url_version
            )
        if explains and isinstance(lane, NativeLane):
            self._explanations.explain(
                lane, exchange, self.version,
                lambda other: Pending(other, exchange, self.version, url_version, query_is_input, flags),
            )  # fmt: skip
            return
        pending = Pending(lane, exchange, self.version, url_version, query_is_input, flags)
        if self._audit is not None and not explains:
            self._audit.consider(exchange, Repetition(
                lambda other, copy: Pending(other, copy, self.version, url_version, query_is_input, flags)
            ))  # fmt: skip
        lane.predict(pending)

    def take(
        self, exchange: Exchange, pending_for: Callable[[Lane], Pending], *, repetition: Repetition,
        explains: bool = False,
    ) -> None:  # fmt: skip
        """As `predict`, for requests of another kind: ``pending_for`` makes one for the lane it is given."""
        lane = self._lane if exchange.kept is None else exchange.kept.lane
        if lane is None:
            raise no_worker_error(self.name, absence(self.state, self.error, self._services.error_format))
        if explains and isinstance(lane, NativeLane):
            self._explanations.explain(lane, exchange, self.version, pending_for)
            return
        pending = pending_for(lane)
        if self._audit is not None and not explains:
            self._audit.consider(exchange, repetition)
        lane.predict(pending)

    @property
    def row_lane(self) -> RowsLane | None:
        """Its lane, if that takes requests as tensors, and nobody wants to see each of them."""
        is_plain = self.state == "READY" and self._audit is None and self.built_in_handler is not None
        return self._lane if is_plain and isinstance(self._lane, RowsLane) and self._lane.takes_rows else None

    @property
    def stage_times(self) -> tuple[StageTimes, StageTimes] | None:
        """Of bodies that became tensors and of outputs that became answers, in the native lane."""
        return self._lane.stage_times if isinstance(self._lane, NativeLane) else None

    async def describe_handler(self) -> SelfDescription:
        """What the handler says of itself.

        Raises:
            ServeError: it could not be asked, or failed.
        """
        return await ask_handler(self._lane, self.name, self.version)

    # --- what others ask ------------------------------------------------------------------------------------------

    @property
    def network(self) -> Network | None:
        """Of the native lane."""
        return self._lane.network if isinstance(self._lane, NativeLane) else None

    @property
    def last_finished_at(self) -> int:
        """ns; when the last batch came to its end; 0 if none did."""
        return self._lane.finished_at if self._lane is not None else 0

    def worker_load_ms(self) -> dict[str, float]:
        return self._lane.worker_load_ms() if self._lane is not None else {}

    def checks(self) -> JsonObject:
        return checks_of(self._lane, self.archive.config, self.audit_report())

    @property
    def lane(self) -> str:
        """``native``, or ``python`` for worker processes."""
        return "native" if self._lane is None or self._lane.is_native else "python"

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
    def precision(self) -> str:
        """Fp32 where what model-config.yaml asks for cannot be had."""
        return self.network.precision if self.network is not None else self.archive.config.precision or "fp32"

    @property
    def has_ready_worker(self) -> bool:
        return self.state == "READY" and self._lane is not None and self._lane.ready_count > 0

    @property
    def requests_in_flight(self) -> int:
        return self._lane.in_flight_count if self._lane is not None else 0

    def worker_rows(self) -> list[WorkerRow]:
        rows = self._lane.worker_rows() if self._lane is not None else []
        if self.state != "LOADING":
            return rows
        first_id, on_gpu = self._services.config.initial_worker_port, self.device != CPU
        return with_coming(rows, self.wanted_workers, first_id=first_id, since=self._registered_at, gpu=on_gpu)

    def queue_status(self) -> tuple[int, int]:
        """(remaining capacity, waiting requests)."""
        waiting = self._lane.waiting_count if self._lane is not None else 0
        return max(0, self.settings.queue_size - waiting), waiting

    def stats(self) -> JsonObject:
        """The native counters and histograms; empty while there is no lane."""
        return self._lane.stats() if self._lane is not None else {}

    def audit_report(self) -> JsonObject | None:
        """What the audit found, see `Audit.report`; None if none is wanted."""
        return self._audit.report() if self._audit is not None else None

    def sample_arguments(self, folder: Path) -> str:
        """As `arguments_for`. REQUIRES: state is READY."""
        return arguments_for(self.name, self.archive, self._lane, folder)
