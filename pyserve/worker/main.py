"""The inside of a worker process: loads a handler, then calls it for batches until the server says that it is enough.

Batches come through the channel; what becomes of the load, logs and metrics go back as reports.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import torch

from pyserve import TORCHSERVE_VERSION
from pyserve.context import Context
from pyserve.engine import load_core
from pyserve.errors import repr_of
from pyserve.handlers.mapped_load import map_loads
from pyserve.launch import EXIT_DEVICE_LOST, INTERRUPT, Reporter
from pyserve.telemetry.custom_metrics import MetricsCache, MetricsCachePyYamlError, MetricsReport
from pyserve.worker.answer import ERROR, Answer, ChannelParts, report_failure
from pyserve.worker.batch_trial import Verdict
from pyserve.worker.entry_point import EntryPoint, HandlerLoadError, HandlerMemoryError, load_entry_point, load_error
from pyserve.worker.failure import HandlerTimeout
from pyserve.worker.invoker import Invoker
from pyserve.worker.lost_device import DeviceLostError
from pyserve.worker.rehearsal import rehearse
from pyserve.worker.reload import Reloader
from pyserve.worker.spec import ASYNC, BATCH, CONTINUOUS, WorkerSpec

EXIT_LOAD_FAILED = 3
# A call that has only just begun is not the one that the server wants to end.
INTERRUPT_AGE_MIN_S = 0.05
WATCH_INTERVAL_MS = 300


def run_worker(spec: WorkerSpec, descriptors: tuple[int, int, int], reports: Reporter) -> int:
    """Serves until the server closes the channel. Returns the exit code.

    Args:
        descriptors: socket, request memory and answer memory.
        reports: where loads, logs and metrics are told.
    """
    began = time.monotonic()
    try:
        log_handler = _set_up(spec, reports)
        context = make_context(spec)
        entry = load_entry_point(spec)
        if spec.mode == ASYNC:  # `initialize` finds the loop that its `handle` will run in
            asyncio.set_event_loop(entry.loop)
        entry.initialize(context)
        if entry.has_side_effects:
            spec = replace(spec, has_side_effects=True)
        verdict = _rehearse(spec, entry, context, reports, began)
    except (HandlerLoadError, HandlerMemoryError) as error:
        _report_failed(reports, error)
        return EXIT_LOAD_FAILED
    except BaseException as error:  # whatever a handler raises while it is imported
        _report_failed(reports, load_error(error, spec.model_dir))
        return EXIT_LOAD_FAILED
    if spec.mode == BATCH:
        log_handler.metrics = context.metrics
    gc.collect()
    if entry.is_built_in:
        gc.freeze()  # not what a handler of one's own made, which may want to replace it and have the memory back
    channel = load_core().WorkerChannel(*descriptors)
    reports.send("loaded", load_s=round(time.monotonic() - began, 3), handler=entry.name, pid=os.getpid(),
                 batch=asdict(verdict), has_side_effects=spec.has_side_effects)  # fmt: skip
    try:
        _serve(spec, entry, context, channel, reports)
    except EOFError:
        pass  # told to stop, or the server is gone
    return 0


def _rehearse(spec: WorkerSpec, entry: EntryPoint, context: Context, reports: Reporter, began: float) -> Verdict:
    """See `rehearsal.rehearse`."""
    if not spec.rehearses or spec.is_audit:
        return Verdict()
    # Should the process end in it, the server knows by what.
    reports.send("rehearsing", is_own_code=not entry.is_built_in)
    return rehearse(spec, entry, context, began=began)


def _metrics_cache(spec: WorkerSpec) -> MetricsCache:
    """A metrics.yaml that cannot be used is reported in the server's log; metrics work without it."""
    try:
        return MetricsCache(spec.name, config=spec.metrics_config, keeps_each=spec.keeps_each_metric)
    except MetricsCachePyYamlError:
        return MetricsCache(spec.name, keeps_each=spec.keeps_each_metric)


def make_context(spec: WorkerSpec) -> Context:
    """The context of a model, as its handler sees it."""
    context = Context(
        spec.name,
        spec.model_dir,
        spec.manifest,
        spec.batch_size,
        spec.gpu_id,
        TORCHSERVE_VERSION,
        spec.limit_max_image_pixels,
        _metrics_cache(spec),
        model_yaml_config=spec.config,
    )
    id_key, start_key, end_key = spec.header_keys
    context.header_key_sequence_id = id_key
    context.header_key_sequence_start, context.header_key_sequence_end = start_key, end_key
    return context


def move_into(spec: WorkerSpec) -> None:
    """Has this process find what a worker process finds.

    Its current folder, its program's name, torch.load that maps weights; as in TorchServe, the folder is on the path of
    Python processes that the handler starts too.
    """
    os.chdir(spec.model_dir)
    sys.argv = [f"pyserve-worker {spec.name}"]
    os.environ["PYTHONPATH"] = f"{spec.model_dir}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    map_loads(spec.originals)  # workers share the pages of state dicts


def _set_up(spec: WorkerSpec, reports: Reporter) -> _ReportHandler:
    move_into(spec)
    torch.set_num_threads(spec.intra_op_threads)
    if spec.is_audit:
        from pyserve.handlers.plain import run_plainly

        run_plainly()
    handler = _ReportHandler(reports)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    return handler


class _ReportHandler(logging.StreamHandler):
    """The handler's own log records, at their own level, a traceback in one piece.

    A StreamHandler, as in TorchServe: handlers look for one to set its format, or to add none of their own.

    Attributes:
        metrics: whose requests the calls of the handler are about; None where calls overlap.
    """

    def __init__(self, reports: Reporter):
        super().__init__(sys.stdout)
        self.metrics: MetricsCache | None = None
        self._reports = reports

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception as error:  # arguments that do not fit the text
            text = f"log record {repr_of(record.msg)} cannot be formatted: {repr_of(error)}"
        level = "WARNING" if record.levelname == "WARN" else record.levelname
        ids = ""
        if self.metrics is not None and record.thread == threading.main_thread().ident:
            ids = ",".join(map(str, self.metrics.request_ids.values()))
        self._reports.send("log", level=level, logger=record.name, text=text, request_id=ids)


def _report_failed(reports: Reporter, error: HandlerLoadError | HandlerMemoryError) -> None:
    reports.send("failed", status=error.status, message=error.message, detail=error.detail, repeats=error.repeats,
                 traceback=error.traceback)  # fmt: skip


def _serve(spec: WorkerSpec, entry: EntryPoint, context: Context, channel: Any, reports: Reporter) -> None:
    parts = ChannelParts(channel)
    invoker = Invoker(spec, entry, context, parts=parts, log_failure=report_failure(reports.send))
    invoker.leave = partial(_leave, reports)
    report = MetricsReport(context.metrics, lambda values: reports.send("metrics", values=values))
    if spec.mode == CONTINUOUS:
        from pyserve.worker.continuous import serve_continuously

        _let_calls_be_interrupted(invoker)
        serve_continuously(channel, invoker, parts, context, report)
    if spec.mode == ASYNC:
        from pyserve.worker.coroutines import serve_coroutines

        # A request over its limit is cancelled like one whose client has gone.
        signal.signal(INTERRUPT, signal.SIG_IGN)
        serve_coroutines(channel, invoker, entry, report)
    _let_calls_be_interrupted(invoker)
    reloader = Reloader(spec, entry, reports) if spec.watch else None
    watch_ms = WATCH_INTERVAL_MS if reloader is not None else -1
    threads = _Threads(spec.intra_op_threads)
    # The base handler notes it by itself; of others TorchServe's log files do not have it.
    has_handler_time = not (context.metrics.keeps_each or entry.inherits("handle"))
    while True:
        report_ms = report.look()
        batch = channel.receive(report_ms if report_ms >= 0 else watch_ms)
        if reloader is not None:
            reloader.look()
        if batch is None:
            continue
        if batch.intra_op_threads != threads.wanted:
            threads.set(batch.intra_op_threads)
        channel.begin(batch.id)
        parts.batch = batch.id
        began = time.perf_counter()
        try:
            answers = invoker.run(batch.items)
        except DeviceLostError:  # its requests are run again, each by itself
            _leave(reports, invoker.device_loss)
        except HandlerTimeout:  # it came just after the call had ended; the requests are answered already
            answers = [(item[0], ERROR, 504, b"", b"{}") for item in batch.items
                       if item[0] not in invoker.sent]  # fmt: skip
        _send(channel, batch.id, answers)
        if invoker.device_loss:
            _leave(reports, invoker.device_loss)
        if invoker.has_answered:  # as in TorchServe, what failed has no times
            handler_s = (invoker.call_ended_at - invoker.call_began_at) / 1e9 if has_handler_time else -1.0
            report.note_prediction(time.perf_counter() - began, handler_s)


def _send(channel: Any, batch: int, answers: list[Answer]) -> None:
    try:
        channel.send(batch, answers)
    except ValueError:  # together they are too large for a frame
        for answer in answers:
            channel.send(batch, [answer])


def _leave(reports: Reporter, loss: str) -> NoReturn:
    """Ends the process without letting go of anything: what is freed on a lost device may hang, or abort."""
    reports.send("device_lost", text=loss)
    sys.stdout.flush()
    os._exit(EXIT_DEVICE_LOST)


def _let_calls_be_interrupted(invoker: Invoker) -> None:
    """INTERRUPT ends the call of the handler that runs; between calls it does nothing."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if invoker.is_calling and time.monotonic() - invoker.called_at >= INTERRUPT_AGE_MIN_S:
            invoker.is_calling = False
            raise HandlerTimeout("the call went on past response_timeout")

    signal.signal(INTERRUPT, interrupt)


class _Threads:
    """torch's threads for one operation: the server's number, unless the handler has set its own."""

    def __init__(self, count: int):
        self.wanted = count
        self._warned = False

    def set(self, count: int) -> None:
        if torch.get_num_threads() != self.wanted:
            if not self._warned:
                self._warned = True
                logging.getLogger("pyserve.worker").warning(
                    "the handler has set %d threads; with %d workers' share that would be %d. Leave it to the server, "
                    "which changes it with the number of workers", torch.get_num_threads(), count, count,
                )  # fmt: skip
        else:
            torch.set_num_threads(count)
        self.wanted = count
