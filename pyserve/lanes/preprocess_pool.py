"""The threads that turn bodies into inputs. A call of an archive's own code that does not come to an end is interrupted
at its limit, and where that does not help, its thread is given up and another one takes its place."""  # fmt: skip

from __future__ import annotations

import asyncio
import ctypes
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any, TypeVar

from pyserve.errors import DeadlineError
from pyserve.lanes.stuck import StuckThreads
from pyserve.worker.failure import HandlerTimeout

T = TypeVar("T")

log = logging.getLogger(__name__)

# How often the calls that run are looked at; slack of their limits.
LOOK_S = 0.5
# From the interruption until the thread is given up.
GRACE_S = 1.0


class LimitedCall:
    """A call that may take ``limit_s`` seconds; ``label`` says whose it is. When it was interrupted, its result is a
    DeadlineError."""  # fmt: skip

    __slots__ = ("_call", "label", "limit_s")

    def __init__(self, call: Callable[[], Any], limit_s: float, label: str):
        self._call = call
        self.limit_s = limit_s
        self.label = label

    def __call__(self) -> Any:
        try:
            return self._call()
        except HandlerTimeout:
            return DeadlineError(
                f"preprocess did not come to an end in time: limit response_timeout={self.limit_s:g} s",
                detail={"reason": "response_timeout"},
            )


class PreprocessPool(Executor):
    """An executor of ``count`` threads. Of calls, only a `LimitedCall` has a limit.

    Args:
        prepare: called in each thread before anything else.
    """

    def __init__(self, count: int, stuck: StuckThreads, prepare: Callable[[], object] = lambda: None):
        self._stuck = stuck
        self._prepare = prepare
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._timer: asyncio.TimerHandle | None = None
        self._is_shut = False
        self._threads: list[_Thread] = []
        for _ in range(count):
            self._add_thread()
        for thread in self._threads:
            thread.prepared.wait()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """As of every executor; loop thread only."""
        if self._is_shut:
            raise RuntimeError("the pool is shut")
        future: Future[T] = Future()
        self._jobs.put((future, fn, args, kwargs))
        if self._timer is None:
            self._timer = self._loop.call_later(LOOK_S, self._look)
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = True) -> None:
        """No call is begun any more; none is waited for."""
        self._is_shut = True
        if self._timer is not None:
            self._timer.cancel()
        while not self._jobs.empty():
            self._jobs.get()[0].cancel()
        for _ in self._threads:
            self._jobs.put(_END)
        for thread in self._threads:
            since, call = thread.current
            if since:
                self._stuck.add_leaving(thread, _what(call))

    def _add_thread(self) -> None:
        thread = _Thread(self._jobs, self._prepare, self._came_back)
        self._threads.append(thread)
        thread.start()

    def _look(self) -> None:
        self._timer = None
        now, is_busy = time.monotonic(), not self._jobs.empty()
        for thread in list(self._threads):
            since, call = thread.current
            is_busy = is_busy or bool(since)
            limit_s = call.limit_s if isinstance(call, LimitedCall) else None
            if not since or limit_s is None or now - since < limit_s:
                continue
            if now - since < limit_s + GRACE_S or not thread.asked_at:
                thread.interrupt(since)
            elif now - thread.asked_at >= GRACE_S and thread.lose(since):
                self._replace(thread, call, now - since)
        if is_busy:
            self._timer = self._loop.call_later(LOOK_S, self._look)

    def _replace(self, thread: _Thread, call: Any, ran_s: float) -> None:
        what = _what(call)
        log.error("%s has run for %.1f s and does not come to an end; another thread takes the place of its own", what,
                  ran_s)  # fmt: skip
        self._threads.remove(thread)
        self._add_thread()
        self._stuck.add(thread, what)

    def _came_back(self, thread: _Thread) -> None:
        """Of a thread that was given up; called by it."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stuck.discard, thread)


_Job = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_END: Any = None


def _what(call: Any) -> str:
    return f"preprocess of {call.label}" if isinstance(call, LimitedCall) else "preparing a body"


class _Thread(threading.Thread):
    """One thread of the pool.

    Attributes:
        current: since when the call that goes on runs, s of ``time.monotonic()``, and the call; (0, None) without one.
        asked_at: when it was interrupted for the first time; 0 if it was not.
    """

    def __init__(self, jobs: SimpleQueue[_Job], prepare: Callable[[], object], came_back: Callable[[_Thread], None]):
        super().__init__(name="preprocess", daemon=True)  # nobody waits for one that does not come to an end
        self.prepared = threading.Event()
        self.current: tuple[float, Any] = (0.0, None)
        self.asked_at = 0.0
        self._jobs = jobs
        self._prepare = prepare
        self._came_back = came_back
        self._lock = threading.Lock()  # held while a call ends, and while it is interrupted or given up
        self._is_lost = False

    def run(self) -> None:
        self._prepare()
        self.prepared.set()
        while not self._is_lost:
            job = self._jobs.get()
            if job is _END:
                return
            future, call, args, kwargs = job
            if not future.set_running_or_notify_cancel():
                continue
            error, result = self._called(call, args, kwargs)
            del job, call, args, kwargs
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
            del future, error, result
        self._came_back(self)

    def _called(self, call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[BaseException | None, Any]:
        error: BaseException | None = None
        result = None
        try:
            self.current = time.monotonic(), call
            result = call(*args, **kwargs)
        except BaseException as raised:
            error = raised
        while True:
            try:
                with self._lock:
                    self.current = 0.0, None  # from here on nobody interrupts
                    if self.asked_at:
                        _raise_in(self.ident, None)  # what was to be raised and has not been yet
                        self.asked_at = 0.0
            except HandlerTimeout:
                continue
            return error, result

    def interrupt(self, since: float) -> None:
        """Raises HandlerTimeout in the call that began then, as soon as it is in Python. Loop thread."""
        with self._lock:
            if self.current[0] == since:
                self.asked_at = self.asked_at or time.monotonic()
                _raise_in(self.ident, HandlerTimeout)

    def lose(self, since: float) -> bool:
        """Takes it out of the pool: it ends with the call that began then. False if that has ended. Loop thread."""
        with self._lock:
            self._is_lost = self.current[0] == since
            return self._is_lost


def _raise_in(ident: int | None, error: type[BaseException] | None) -> None:
    assert ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(error) if error else None)
