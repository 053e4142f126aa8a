"""One worker process, as the server sees it: its descriptors, what it reports, and its end. Loop thread only."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from datetime import datetime

from pyserve.errors import JsonObject, ModelLoadError, OutOfMemoryError
from pyserve.lanes.worker_output import READ_SIZE, OutputReader
from pyserve.launch import INTERRUPT, ReportReader, describe_exit

# Records of a worker in one second; the rest of it is dropped.
RECORDS_MAX = 1000
TEXT_SIZE_MAX = 64 << 10
# How long the zygote may take to say how a worker ended.
ENDING_S = 2.0


class WorkerLoadError(ModelLoadError):
    """A worker process failed before it was ready.

    Attributes:
        repeats: whether the same error would come again.
    """

    repeats = False


class WorkerMemoryError(OutOfMemoryError):
    """Memory ran out while a worker loaded."""

    repeats = False


class WorkerHandle:
    """A worker process.

    Args:
        descriptors: ours of ``socket``, ``request_memory``, ``answer_memory``, ``reports``, ``stdout``, ``stderr``.
        on_event: told of reports other than ``loaded``, ``failed`` and ``log``.
        label: ``name version``, for the log.
        about: what records of its output are about, see `log.about`.

    Attributes:
        loaded: its ``loaded`` report; raises WorkerLoadError or WorkerMemoryError.
        is_lost: it ended because its zygote did.
        was_killed: it ended by a SIGKILL that was none of ours.
        has_lost_device: it ended because it could not use its device any more.
        is_rehearsing: whether it tries code of the archive's own with samples, the last step of loading.
        exited: how it ended, such as ``was killed by SIGSEGV``; done once it is gone and its output has been read.
    """

    def __init__(
        self, pid: int, pidfd: int, descriptors: dict[str, int], *, on_event: Callable[[JsonObject], None], label: str,
        about: dict[str, str] | None = None,
    ):  # fmt: skip
        loop = asyncio.get_running_loop()
        self.pid = pid
        self.started_at = datetime.now()
        self.socket_fd = descriptors["socket"]
        self.request_memory_fd = descriptors["request_memory"]
        self.answer_memory_fd = descriptors["answer_memory"]
        self.loaded: asyncio.Future[JsonObject] = loop.create_future()
        self.exited: asyncio.Future[str] = loop.create_future()
        self.is_rehearsing = self.is_lost = self.was_killed = self.has_lost_device = False
        self._was_ended = False  # by us
        self._loop = loop
        self._pidfd = pidfd
        self._label = label
        self._on_event = on_event
        self._about = about or {}
        self._log = logging.getLogger(f"pyserve.model.{label.replace(' ', '_')}")
        self._reports = ReportReader(descriptors["reports"])
        self._streams: dict[int, OutputReader] = {}
        self._second, self._records, self._dropped = -1, 0, 0
        self._ending: str | None = None
        self._is_gone = False
        self._ending_timer: asyncio.TimerHandle | None = None
        for name, level in (("stdout", logging.INFO), ("stderr", logging.WARNING)):
            fd = descriptors[name]
            self._streams[fd] = OutputReader(self._log, level, self._on_metric, about={**self._about, "stream": name})
            loop.add_reader(fd, self._read_output, fd)
        loop.add_reader(self._reports.fd, self._read_reports)
        loop.add_reader(pidfd, self._on_gone)
        # Whoever does not ask must not be told that nobody asked.
        self.loaded.add_done_callback(lambda future: future.cancelled() or future.exception())

    # --- what others do -------------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Asks the handler call that runs to end; see `pyserve.worker`."""
        self._signal(INTERRUPT)

    def kill(self) -> None:
        """Ends the process and what it has started, at once."""
        if not self._is_gone:
            self._was_ended = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if not self._is_gone:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def memory_usage(self) -> int:
        """Bytes of it that are in RAM; 0 when it is gone."""
        with contextlib.suppress(OSError, IndexError), open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def release(self) -> None:
        """Closes what is ours. REQUIRES: it has exited."""
        for fd in (self.socket_fd, self.request_memory_fd, self.answer_memory_fd):
            os.close(fd)

    # --- its end --------------------------------------------------------------------------------------------------

    def set_ending(self, code: int) -> None:
        """The zygote knows how it ended: its exit code, or the signal's number, negative."""
        self._ending = describe_exit(code)
        self.was_killed = code == -signal.SIGKILL and not self._was_ended
        self._finish()

    def zygote_is_gone(self) -> None:
        """Nobody will report how it ended; it ends with the zygote."""
        if self._ending is None:
            self._ending = "ended with its zygote"
            self.is_lost = not self._was_ended
        self._finish()

    def _on_gone(self) -> None:
        """The process is gone; its status comes from the zygote."""
        self._is_gone = True
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._ending is None:
            self._ending_timer = self._loop.call_later(ENDING_S, self._go_without_ending)
        self._finish()

    def _go_without_ending(self) -> None:
        """The zygote does not say how it ended: it is stopped, or in trouble itself."""
        if self._ending is None:
            self._ending = "ended"
            self._finish()

    def _finish(self) -> None:
        if not self._is_gone or self._ending is None or self.exited.done():
            return
        if self._ending_timer is not None:
            self._ending_timer.cancel()  # it would keep us, and with us the lane of a model that is unregistered
        self._read_reports()
        for fd in list(self._streams):
            # What its children still print is nobody's: they were killed with it.
            while fd in self._streams and self._read_output(fd):
                pass
            self._close_stream(fd)
        if self._reports.fd >= 0:
            self._loop.remove_reader(self._reports.fd)
            self._reports.close()
        if not self.loaded.done():
            error = WorkerLoadError(
                f"the worker of {self._label} {self._ending} while it loaded",
                detail={"text": f"the worker process {self._ending} while it loaded"},
            )
            self.loaded.set_exception(error)
        self.exited.set_result(self._ending)

    # --- what it says ---------------------------------------------------------------------------------------------

    def _read_output(self, fd: int) -> bool:
        """One piece. False when there is nothing more for now."""
        try:
            chunk = os.read(fd, READ_SIZE)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if not chunk:
            self._close_stream(fd)
            return False
        self._streams[fd].feed(chunk)
        return True

    def _close_stream(self, fd: int) -> None:
        reader = self._streams.pop(fd, None)
        if reader is not None:
            self._loop.remove_reader(fd)
            os.close(fd)
            reader.close()

    def _on_metric(self, value: JsonObject) -> None:
        self._on_event({"event": "metrics", "values": [value]})

    def _read_reports(self) -> None:
        if self._reports.fd < 0:
            return
        for event in self._reports.read():
            self._on_report(event)
        if self._reports.at_end:
            self._loop.remove_reader(self._reports.fd)
            self._reports.close()

    def _on_report(self, event: JsonObject) -> None:
        kind = event["event"]
        if kind == "log":
            self._write_record(event)
        elif kind == "device_lost":
            self.has_lost_device = True
            self._log.error("%s: the device is lost for this worker, which ends: %s", self._label,
                            str(event.get("text", ""))[:TEXT_SIZE_MAX], extra=self._about)  # fmt: skip
        elif kind == "rehearsing":
            self.is_rehearsing = bool(event.get("is_own_code"))
        elif kind == "loaded":
            self.is_rehearsing = False
            if not self.loaded.done():
                self.loaded.set_result(event)
        elif kind == "failed":
            self._on_failed(event)
        else:
            self._on_event(event)

    def _on_failed(self, event: JsonObject) -> None:
        self.is_rehearsing = False
        if self.loaded.done():
            return
        detail = event.get("detail")
        kind = WorkerMemoryError if event.get("status") == 507 else WorkerLoadError
        error = kind(str(event.get("message", ""))[:TEXT_SIZE_MAX], detail=detail if isinstance(detail, dict) else None)
        error.repeats = bool(event.get("repeats"))
        self._log.error("%s cannot be loaded: %s\n%s", self._label, error.reason(),
                        str(event.get("traceback", ""))[:TEXT_SIZE_MAX], extra=self._about)  # fmt: skip
        self.loaded.set_exception(error)

    def _write_record(self, event: JsonObject) -> None:
        second = int(time.monotonic())
        if second != self._second:
            if self._dropped:
                self._log.warning("%d of its log records were dropped: more than %d in a second", self._dropped,
                                  RECORDS_MAX, extra=self._about)  # fmt: skip
            self._second, self._records, self._dropped = second, 0, 0
        self._records += 1
        if self._records > RECORDS_MAX:
            self._dropped += 1
            return
        level = logging.getLevelName(str(event.get("level", "INFO")))
        name = str(event.get("logger") or "")[:200]
        prefix = f"{name}: " if name and name != "root" else ""
        ids = str(event.get("request_id") or "")[:TEXT_SIZE_MAX]
        self._log.log(level if isinstance(level, int) else logging.INFO, "%s%s", prefix,
                      str(event.get("text", ""))[:TEXT_SIZE_MAX],
                      extra={**self._about, "stream": "stdout", "request_id": ids})  # fmt: skip
