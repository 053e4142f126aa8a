"""Starts worker processes: forks of a zygote, one zygote per Python interpreter. Loop thread only."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from pyserve.errors import JsonObject, ModelLoadError
from pyserve.lanes.restart_policy import Cause, RestartPolicy
from pyserve.lanes.worker_handle import WorkerHandle
from pyserve.launch import SAFE_PATH, child_environment, child_folder, describe_exit, stderr_file
from pyserve.worker.descendants import MARK, end_marked, mark_of, new_token
from pyserve.worker.spec import WorkerSpec
from pyserve.worker.zygote import MESSAGE_SIZE_MAX

log = logging.getLogger(__name__)

REQUEST_MEMORY_SIZE = 1 << 20  # grows with what is sent
ANSWER_MEMORY_SIZE = 64 << 20  # sparse: what is not written takes no memory
ZYGOTE_START_S = 60.0

# Variables that the server sets when a model asks for workers, by when their zygote may be running.
_SET_LATER = ("PYSERVE_WEIGHTS_CACHE",)


# A fork takes milliseconds. A zygote that does not answer for so long is stuck, and another one is started.
FORK_S = 30.0
# Between the end of its socket and that of the process.
EXIT_S = 0.1


class ZygoteError(ModelLoadError):
    """No worker can be forked.

    Attributes:
        cause: LOST if the zygote could fork before it went, else MACHINE.
    """

    cause = Cause.MACHINE


class Spawner:
    """All zygotes of a server and their workers.

    Args:
        without: names of environment variables that workers do not get.
        environment: variables that they get beside the server's own.
        open_files_max: descriptors that each may have; None for as many as the server.
        family: what the tokens of zygotes begin with, see `descendants`.
    """

    def __init__(
        self, without: Callable[[str], bool] = lambda name: False, environment: Mapping[str, str] | None = None,
        open_files_max: int | None = None, family: str = "",
    ):  # fmt: skip
        self._family = family
        self._without = without
        self._environment = dict(environment or {})
        self._open_files_max = open_files_max
        self._zygotes: dict[str, _Zygote] = {}
        self._paces: dict[str, RestartPolicy] = {}  # of the zygotes that went, by interpreter

    @property
    def is_lost(self) -> bool:
        """Whether what workers are forked from has gone, and no other has taken its place."""
        return any(zygote.is_gone and zygote.was_lost for zygote in self._zygotes.values())

    def prepare(self, interpreter: str | None = None) -> None:
        """Begins to start the zygote of ``interpreter``, by default our own; returns at once.

        Raises:
            ModelLoadError: the interpreter cannot be run.
        """
        self._zygote(interpreter or sys.executable)

    async def spawn(
        self, spec: WorkerSpec, *, on_event: Callable[[JsonObject], None], label: str, interpreter: str | None = None,
        about: dict[str, str] | None = None,
    ) -> WorkerHandle:  # fmt: skip
        """A new worker process, which begins to load.

        Args:
            on_event: told of its reports other than of its load and its log.
            label: ``name version``, for the log.
            about: what records of its output are about, see `log.about`.

        Raises:
            ZygoteError: there is no zygote to fork it from.
            ModelLoadError: the machine has no descriptors, memory or processes left, or the interpreter cannot be run.
        """
        zygote = await self._paced_zygote(interpreter or sys.executable)
        return await zygote.fork(spec, on_event=on_event, label=label, about=about or {})

    async def _paced_zygote(self, interpreter: str) -> _Zygote:
        """The one that runs, or another one: at once, unless the last ones went soon after their start."""
        while True:
            zygote = self._zygotes.get(interpreter)
            if zygote is None or not zygote.is_gone:
                return self._zygote(interpreter)
            if not zygote.was_lost:
                return self._zygote(interpreter)  # whoever wants a worker of it tries again after growing pauses
            pace = self._paces.setdefault(interpreter, RestartPolicy())
            if zygote.restart_at is None:
                now = time.monotonic()
                pace.ready(zygote.ready_at or zygote.started_at)
                zygote.restart_at = now + pace.died(now, Cause.KILLED).delay_s
                log.error("the process that workers are forked from %s; another one is started", zygote.ending)
            pause_s = zygote.restart_at - time.monotonic()
            if pause_s <= 0:
                return self._zygote(interpreter)
            await asyncio.sleep(pause_s)

    def _zygote(self, interpreter: str) -> _Zygote:
        zygote = self._zygotes.get(interpreter)
        if zygote is None or zygote.is_gone:
            try:
                zygote = self._zygotes[interpreter] = _Zygote(
                    interpreter, self._without, self._environment, self._open_files_max, self._family + new_token()
                )
            except OSError as error:
                raise ZygoteError(
                    f"the process that workers are forked from cannot be started: {error.strerror}"
                ) from error
        return zygote

    async def close(self) -> None:
        """Ends all zygotes and, with them, all workers; returns when they are gone."""
        await asyncio.gather(*(zygote.close() for zygote in self._zygotes.values()))
        self._zygotes.clear()


class _Zygote:
    """One zygote process and the workers it has forked."""

    def __init__(
        self, interpreter: str, without: Callable[[str], bool], environment: Mapping[str, str],
        open_files_max: int | None, token: str,
    ):  # fmt: skip
        self._loop = asyncio.get_running_loop()
        self._environment = environment
        self._without = without
        self._token = token
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._next_number = 0
        self._forking: dict[int, asyncio.Future[tuple[int, int]]] = {}
        self._workers: dict[int, WorkerHandle] = {}
        self._endings: dict[int, int] = {}  # of workers that were gone before they were known
        self._abandoned: set[int] = set()  # that nobody wanted any more
        self.is_gone = self.was_lost = False
        self.started_at, self.ready_at = time.monotonic(), 0.0
        self.restart_at: float | None = None  # of the next one
        self.ending = ""
        with contextlib.ExitStack() as opened:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            opened.callback(self._socket.close)
            with theirs:
                self._stderr = stderr_file()
                opened.callback(self._stderr.close)
                self._socket.setblocking(False)
                self._process = self._start(interpreter, theirs)
            if open_files_max is not None:
                _limit_open_files(self._process.pid, open_files_max)
            opened.callback(self._process.wait)
            opened.callback(self._process.kill)
            self._loop.add_reader(self._socket.fileno(), self._read)
            opened.pop_all()

    def _start(self, interpreter: str, theirs: socket.socket) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [interpreter, *SAFE_PATH, "-m", "pyserve.worker.zygote", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=(theirs.fileno(),),
                cwd=child_folder(),
                env=child_environment() | {MARK: mark_of(self._token)},
                start_new_session=True,
            )
        except OSError as error:
            raise ModelLoadError(f"{interpreter} cannot be run: {error.strerror}") from error

    async def fork(
        self, spec: WorkerSpec, *, on_event: Callable[[JsonObject], None], label: str, about: dict[str, str]
    ) -> WorkerHandle:
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), ZYGOTE_START_S)
        except TimeoutError:
            self._on_gone()
            raise ZygoteError(
                f"the process that workers are forked from was not ready after {ZYGOTE_START_S:g} s"
            ) from None
        number = self._next_number
        self._next_number += 1
        request = {
            "title": f"py-{spec.name}",
            "spec": spec.to_json(),
            "environment": {**_set_later(), **self._environment},
            "without": [name for name in os.environ if self._without(name)],
        }
        try:
            ours, theirs = _descriptors(json.dumps(request).encode())
        except OSError as error:
            raise _no_worker(error) from error
        forked: asyncio.Future[tuple[int, int]] = self._loop.create_future()
        self._forking[number] = forked
        try:
            self._send({"number": number}, list(theirs.values()))
            pid, pidfd = await asyncio.wait_for(forked, FORK_S)
        except BaseException as error:
            self._abandon(forked)
            for fd in ours.values():
                os.close(fd)
            if isinstance(error, TimeoutError):
                self._on_gone()
                raise ZygoteError(f"the process that workers are forked from did not answer for {FORK_S:g} s") from None
            raise
        finally:
            self._forking.pop(number, None)
            for fd in theirs.values():
                os.close(fd)
        try:
            handle = WorkerHandle(pid, pidfd, ours, on_event=on_event, label=label, about=about)
        except BaseException:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            for fd in (pidfd, *ours.values()):
                os.close(fd)
            raise
        self._workers[pid] = handle
        if pid in self._endings:
            handle.set_ending(self._endings.pop(pid))
        elif self.is_gone:
            handle.zygote_is_gone()
        return handle

    def _send(self, message: JsonObject, descriptors: list[int]) -> None:
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode()], descriptors)
        except OSError as error:
            raise _no_worker(error, self._last_error_line()) from error

    def _read(self) -> None:
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(self._socket, MESSAGE_SIZE_MAX, 1)
            except BlockingIOError:
                return
            except OSError:
                message, descriptors = b"", []
            if not message:
                self._on_gone()
                return
            self._on_message(json.loads(message), descriptors)

    def _on_message(self, message: JsonObject, descriptors: list[int]) -> None:
        if "ready" in message:
            self.ready_at = time.monotonic()
            self._ready.set_result(None)
        elif "forked" in message:
            self._on_forked(message, descriptors)
        elif "failed" in message:
            forked = self._forking.get(message["failed"])
            if forked is not None and not forked.done():
                number = int(message["errno"])
                forked.set_exception(_no_worker(OSError(number, os.strerror(number))))
        elif "exited" in message:
            pid, code = int(message["exited"]), os.waitstatus_to_exitcode(message["status"])
            worker = self._workers.pop(pid, None)
            if worker is not None:
                worker.set_ending(code)
            elif pid in self._abandoned:
                self._abandoned.remove(pid)
            else:
                self._endings[pid] = code

    def _on_forked(self, message: JsonObject, descriptors: list[int]) -> None:
        forked = self._forking.get(message["forked"])
        pid = int(message["pid"])
        if forked is not None and not forked.done() and descriptors:
            forked.set_result((pid, descriptors[0]))
            return
        # Whoever wanted it has gone, or we had no descriptor left to take its own.
        self._end_worker(pid, descriptors)
        if forked is not None and not forked.done():
            forked.set_exception(_no_worker(OSError(errno.EMFILE, os.strerror(errno.EMFILE))))

    def _abandon(self, forked: asyncio.Future[tuple[int, int]]) -> None:
        """Nobody wants the worker any more, should it be there already."""
        if forked.done() and not forked.cancelled() and forked.exception() is None:
            pid, pidfd = forked.result()
            self._end_worker(pid, [pidfd])

    def _end_worker(self, pid: int, descriptors: list[int]) -> None:
        if self._endings.pop(pid, None) is None:
            self._abandoned.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for fd in descriptors:
            os.close(fd)

    def _on_gone(self) -> None:
        if self.is_gone:
            return
        self.is_gone = True
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        code = self._end()
        self.ending = describe_exit(code)
        self.was_lost = self.ready_at > 0 or code == -signal.SIGKILL
        error = ZygoteError(f"the process that workers are forked from {self.ending}{self._last_error_line()}")
        if self.was_lost:
            error.cause = Cause.LOST
        if not self._ready.done():
            self._ready.set_exception(error)
        for forked in self._forking.values():
            if not forked.done():
                forked.set_exception(error)
        for worker in self._workers.values():
            worker.zygote_is_gone()
        self._workers.clear()
        self._stderr.close()

    def _end(self) -> int:
        """Sees that it is gone, with all that its workers started; its exit code."""
        try:
            code = self._process.wait(EXIT_S)  # it has closed its socket: it is ending, or is stuck
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
            code = 0 if code == -signal.SIGKILL else code  # by us
        # The workers end with it; what they had started, in sessions of its own, does not.
        self._loop.run_in_executor(None, end_marked, self._token)
        return code

    def _last_error_line(self) -> str:
        if self._stderr.closed:
            return ""
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    async def close(self) -> None:
        if self.is_gone:
            return
        workers = list(self._workers.values())
        for worker in workers:
            worker.kill()
        if workers:
            await asyncio.wait([worker.exited for worker in workers], timeout=5.0)
        self._process.kill()
        self._on_gone()


def _limit_open_files(pid: int, count: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, hard))


def _no_worker(error: OSError, more: str = "") -> ModelLoadError:
    """``error`` kept the machine from giving us another process."""
    fix = ""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        fix = "; raise the limit of open files (`ulimit -n`), or allow fewer connections"
    elif error.errno in (errno.ENOMEM, errno.EAGAIN):
        fix = "; there is no memory left, or no process allowed any more (`ulimit -u`, the cgroup's pids.max)"
    failure = ModelLoadError(f"no worker can be started: {error.strerror}{more}{fix}")
    failure.__cause__ = error
    return failure


def _descriptors(request: bytes) -> tuple[dict[str, int], dict[str, int]]:
    """What a worker and the server need of each other: (ours, the worker's), the worker's in the order of the zygote.

    Args:
        request: what the worker is to be.
    """
    ours: dict[str, int] = {}
    theirs: dict[str, int] = {}
    try:
        theirs["request"] = _filled_memory("request", request)
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours["socket"], theirs["socket"] = mine.detach(), its.detach()
        for name, size in (("request_memory", REQUEST_MEMORY_SIZE), ("answer_memory", ANSWER_MEMORY_SIZE)):
            ours[name] = _memory(name, size)
            theirs[name] = os.dup(ours[name])
        for name in ("reports", "stdout", "stderr"):
            ours[name], theirs[name] = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(ours[name], False)
    except BaseException:
        for fd in (*ours.values(), *theirs.values()):
            os.close(fd)
        raise
    return ours, theirs


def _filled_memory(name: str, content: bytes) -> int:
    """A descriptor, at the beginning of ``content``."""
    fd = os.memfd_create(f"pyserve-{name}", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _memory(name: str, size: int) -> int:
    fd = os.memfd_create(f"pyserve-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    seals: Any = fcntl.F_SEAL_SHRINK | (fcntl.F_SEAL_GROW if name == "answer_memory" else 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _set_later() -> dict[str, str]:
    return {name: os.environ[name] for name in _SET_LATER if name in os.environ}
