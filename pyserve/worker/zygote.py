"""The zygote: a process that has imported what every worker needs and run none of it, and forks workers on request.

A fork of it is a worker with torch loaded, within milliseconds. It must never run an operation of torch itself: that
would start threads, which a fork does not copy and whose locks it would inherit.

Over a SEQPACKET socket come requests, {"number": number} with `DESCRIPTORS` beside it; what the worker is to be lies in
memory, as JSON, since a message may not be as large as a model-config.yaml. The answers are

    {"ready": pid}                            it can fork
    {"forked": number, "pid": pid}            with a pidfd
    {"failed": number, "errno": errno}        the machine has no process, memory or descriptor left
    {"exited": pid, "status": wait status}    one line per worker that has ended

What a worker's code has started ends with the worker, see `descendants`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import random
import resource
import selectors
import signal
import socket
import sys
import traceback
from typing import NoReturn

from pyserve import devices
from pyserve.launch import Reporter, die_with_parent
from pyserve.log import print_lines_at_once
from pyserve.worker.descendants import MARK, adopt_orphans, end_marked, mark_of, take_mark

MESSAGE_SIZE_MAX = 4096
DESCRIPTORS = ("request", "socket", "request_memory", "answer_memory", "reports", "stdout", "stderr")
_PR_SET_NAME = 15
EXIT_SETUP_FAILED = 70


def main(descriptor: int, parent_pid: int) -> int:
    """Forks workers until the server goes."""
    die_with_parent(parent_pid)
    adopt_orphans()
    gc.disable()  # importing torch makes millions of objects that all stay
    # What is imported here is shared by all workers.
    import numpy  # noqa: F401

    import pyserve.handlers.base_handler
    import pyserve.worker.main  # noqa: F401

    assert not devices.is_used()  # or its children could not use them
    gc.collect()
    gc.freeze()
    gc.enable()
    server = socket.socket(fileno=descriptor)
    server.send(json.dumps({"ready": os.getpid()}).encode())
    return _Zygote(server).run()


class _Zygote:
    def __init__(self, server: socket.socket):
        self._server = server
        self._token = os.environ.get(MARK, "").partition(".")[0]
        self._marks: dict[int, str] = {}  # of the living workers
        self._wakeup, wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        wakeup.setblocking(False)
        self._wakeup_end = wakeup
        signal.set_wakeup_fd(wakeup.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        # A terminal's Ctrl-C is for whoever runs the server, which will tell us.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def run(self) -> int:
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            selector.register(self._wakeup, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._wakeup:
                        with contextlib.suppress(BlockingIOError):
                            self._wakeup.recv(4096)
                    elif not self._serve_one():
                        return 0
                self._reap()

    def _serve_one(self) -> bool:
        message, descriptors, _, _ = socket.recv_fds(self._server, MESSAGE_SIZE_MAX, len(DESCRIPTORS))
        if not message:
            return False
        number = json.loads(message)["number"]
        try:
            if len(descriptors) != len(DESCRIPTORS):  # the kernel leaves out those that there is no room for
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self._fork(number, dict(zip(DESCRIPTORS, descriptors, strict=True)))
        except OSError as error:
            self._server.send(json.dumps({"failed": number, "errno": error.errno or 0}).encode())
        finally:
            for each in descriptors:
                os.close(each)
        return True

    def _fork(self, number: int, named: dict[str, int]) -> None:
        mark = mark_of(self._token, number + 1)
        pid = os.fork()
        if pid == 0:
            self._become_worker(named, mark)
        self._marks[pid] = mark
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            raise
        try:
            told = json.dumps({"forked": number, "pid": pid}).encode()
            socket.send_fds(self._server, [told], [pidfd])
        finally:
            os.close(pidfd)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            mark = self._marks.pop(pid, "")
            if not mark:
                continue  # what a worker left behind
            # What the worker's handler has started goes with it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            if self._token:
                end_marked(mark)
            self._server.send(json.dumps({"exited": pid, "status": status}).encode())

    def _become_worker(self, named: dict[str, int], mark: str) -> NoReturn:
        """The child. Never returns."""
        code = EXIT_SETUP_FAILED
        try:
            parent = os.getppid()
            os.setsid()
            if self._token:
                take_mark(mark)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(
                signal.SIGINT, signal.default_int_handler
            )  # as Python starts; _thread.interrupt_main needs it
            self._server.close()
            self._wakeup.close()
            self._wakeup_end.close()
            die_with_parent(parent)
            resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            os.dup2(named["stdout"], 1)
            os.dup2(named["stderr"], 2)
            for each in (nothing, named["stdout"], named["stderr"]):
                os.close(each)
            print_lines_at_once()
            code = _run(named)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)


def _run(named: dict[str, int]) -> int:
    from pyserve.worker.main import run_worker
    from pyserve.worker.spec import WorkerSpec

    with open(named["request"], "rb") as file:
        request = json.loads(file.read())
    for name in request["without"]:
        os.environ.pop(name, None)
    os.environ.update(request["environment"])
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"{request['title']}"[:15].encode(), 0, 0, 0)
    _draw_seeds_again()
    spec = WorkerSpec.from_json(request["spec"])
    channel = (named["socket"], named["request_memory"], named["answer_memory"])
    return run_worker(spec, channel, Reporter(named["reports"]))


def _draw_seeds_again() -> None:
    """Workers that were forked from one process would otherwise draw the same numbers."""
    import numpy as np
    import torch

    random.seed()
    np.random.seed(int.from_bytes(os.urandom(4), "little"))
    torch.manual_seed(int.from_bytes(os.urandom(7), "little"))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
