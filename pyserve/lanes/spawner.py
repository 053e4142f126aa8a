"""Starts worker processes: forks of a zygote, one zygote per Python interpreter. Loop thread only."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from pyserve.errors import JsonObject, ModelLoadError
from pyserve.lanes.worker_handle import WorkerHandle
from pyserve.launch import SAFE_PATH, child_environment, child_folder, describe_exit
from pyserve.worker.spec import WorkerSpec
from pyserve.worker.zygote import MESSAGE_SIZE_MAX

log = logging.getLogger(__name__)

REQUEST_MEMORY_SIZE = 1 << 20  # grows with what is sent
ANSWER_MEMORY_SIZE = 64 << 20  # sparse: what is not written takes no memory
ZYGOTE_START_S = 60.0

# Variables that the server sets when a model asks for workers, by when their zygote may be running.
_SET_LATER = ("PYSERVE_WEIGHTS_CACHE",)


class Spawner:
    """All zygotes of a server and their workers.

    Args:
        without: names of environment variables that workers do not get.
        environment: variables that they get beside the server's own.
    """

    def __init__(
        self, without: Callable[[str], bool] = lambda name: False, environment: Mapping[str, str] | None = None
    ):
        self._without = without
        self._environment = dict(environment or {})
        self._zygotes: dict[str, _Zygote] = {}

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
            ModelLoadError: there is no zygote to fork it from.
        """
        zygote = self._zygote(interpreter or sys.executable)
        return await zygote.fork(spec, on_event=on_event, label=label, about=about or {})

    def _zygote(self, interpreter: str) -> _Zygote:
        zygote = self._zygotes.get(interpreter)
        if zygote is None or zygote.is_gone:
            zygote = self._zygotes[interpreter] = _Zygote(interpreter, self._without, self._environment)
        return zygote

    async def close(self) -> None:
        """Ends all zygotes and, with them, all workers; returns when they are gone."""
        await asyncio.gather(*(zygote.close() for zygote in self._zygotes.values()))
        self._zygotes.clear()


class _Zygote:
    """One zygote process and the workers it has forked."""

    def __init__(self, interpreter: str, without: Callable[[str], bool], environment: Mapping[str, str]):
        self._loop = asyncio.get_running_loop()
        self._environment = environment
        self._without = without
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._next_number = 0
        self._forking: dict[int, asyncio.Future[tuple[int, int]]] = {}
        self._workers: dict[int, WorkerHandle] = {}
        self._endings: dict[int, str] = {}  # of workers that were gone before they were known
        self.is_gone = False
        self._socket.setblocking(False)
        try:
            self._process = subprocess.Popen(
                [interpreter, *SAFE_PATH, "-m", "pyserve.worker.zygote", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=(theirs.fileno(),),
                cwd=child_folder(),
                env=child_environment(),
                start_new_session=True,
            )
        except OSError as error:
            self._socket.close()
            self._stderr.close()
            raise ModelLoadError(f"{interpreter} cannot be run: {error.strerror}") from error
        finally:
            theirs.close()
        self._loop.add_reader(self._socket.fileno(), self._read)

    async def fork(
        self, spec: WorkerSpec, *, on_event: Callable[[JsonObject], None], label: str, about: dict[str, str]
    ) -> WorkerHandle:
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), ZYGOTE_START_S)
        except TimeoutError:
            raise ModelLoadError(
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
        ours, theirs = _descriptors(json.dumps(request).encode())
        forked: asyncio.Future[tuple[int, int]] = self._loop.create_future()
        self._forking[number] = forked
        try:
            self._send({"number": number}, list(theirs.values()))
            pid, pidfd = await forked
        except BaseException:
            for fd in ours.values():
                os.close(fd)
            raise
        finally:
            self._forking.pop(number, None)
            for fd in theirs.values():
                os.close(fd)
        handle = self._workers[pid] = WorkerHandle(pid, pidfd, ours, on_event=on_event, label=label, about=about)
        if pid in self._endings:
            handle.set_ending(self._endings.pop(pid))
        elif self.is_gone:
            handle.zygote_is_gone()
        return handle

    def _send(self, message: JsonObject, descriptors: list[int]) -> None:
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode()], descriptors)
        except OSError as error:
            raise ModelLoadError(f"no worker can be forked: {error.strerror}{self._last_error_line()}") from error

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
            self._ready.set_result(None)
        elif "forked" in message:
            forked = self._forking.get(message["forked"])
            if forked is None or forked.done():  # whoever wanted it has gone
                for fd in descriptors:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(message["pid"], 9)
                    os.close(fd)
            else:
                forked.set_result((message["pid"], descriptors[0]))
        elif "exited" in message:
            ending = describe_exit(os.waitstatus_to_exitcode(message["status"]))
            worker = self._workers.pop(message["exited"], None)
            if worker is not None:
                worker.set_ending(ending)
            else:
                self._endings[message["exited"]] = ending

    def _on_gone(self) -> None:
        if self.is_gone:
            return
        self.is_gone = True
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        error = ModelLoadError(f"the process that workers are forked from ended{self._last_error_line()}")
        if not self._ready.done():
            self._ready.set_exception(error)
        for forked in self._forking.values():
            if not forked.done():
                forked.set_exception(error)
        for worker in self._workers.values():
            worker.zygote_is_gone()
        self._workers.clear()
        self._process.kill()
        self._process.wait()  # it has closed its socket: it is ending, or was killed
        self._stderr.close()

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
        self._on_gone()


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
