"""The clients: threads in a process of their own, so that they and the measuring of health do not wait for each other.

Only what is not right crosses to the campaign, through a pipe; what is right is counted in shared memory.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawArray, RawValue
from typing import Any, NamedTuple, Protocol

from tests.chaos import ledger
from tests.chaos.grpc_kinds import GRPC_KINDS
from tests.chaos.http_client import HttpClient
from tests.chaos.kinds import HTTP_KINDS, Seen
from tests.chaos.ledger import Expectations, Record

_UNREACHABLE_PAUSE_S = 0.02
_PAUSED_LOOK_S = 0.005
_END_S = 60.0


class Asking(Protocol):
    """What `tests.chaos.kinds` and `tests.chaos.grpc_kinds` have in common."""

    name: str
    model: str

    def ask(self, id: str) -> Seen: ...

    def close(self) -> None: ...


class Target(NamedTuple):
    """Whom to ask: HTTP's inference port, and gRPC's as ``host:port``."""

    http: tuple[str, int]
    grpc: str
    is_tls: bool

    def askers(self, expectations: Expectations) -> list[Callable[[], Asking]]:
        """One maker for each kind."""
        made: list[Callable[[], Asking]] = [
            lambda kind=kind: kind(HttpClient(self.http, is_tls=self.is_tls), expectations)  # type: ignore[misc]
            for kind in HTTP_KINDS
        ]
        return made + [lambda kind=kind: kind(self.grpc, expectations) for kind in GRPC_KINDS]


class Traffic:
    """Clients of every kind in a child process; a context.

    Args:
        rate: requests a second of all clients together, at most.
        clients: how many of each kind.
        on_record: called for each request that was not simply answered right, in a thread.
    """

    def __init__(self, target: Target, *, rate: float, clients: int, on_record: Callable[[Record], None]):
        self._target = target
        self._interval_s = (len(HTTP_KINDS) + len(GRPC_KINDS)) * clients / rate
        self._count = (len(HTTP_KINDS) + len(GRPC_KINDS)) * clients
        self._on_record = on_record
        # One place for each thread, so that nobody needs a lock.
        self._sent = RawArray(ctypes.c_ulonglong, self._count)
        self._right = RawArray(ctypes.c_ulonglong, self._count)
        self._is_quiet = RawArray(ctypes.c_bool, self._count)
        self._paused = RawValue(ctypes.c_bool, True)
        self._ended = RawValue(ctypes.c_bool, False)
        self._records, self._writer = multiprocessing.Pipe(duplex=False)
        self._process = multiprocessing.get_context("fork").Process(target=self._run, name="chaos traffic")
        self._reader = threading.Thread(target=self._read_records, name="records")

    def __enter__(self) -> Traffic:
        self._process.start()
        self._writer.close()
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.value = True
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise AssertionError(f"the clients have not ended within {_END_S:g} s")
        self._reader.join()

    @property
    def sent(self) -> int:
        return sum(self._sent)

    @property
    def right(self) -> int:
        return sum(self._right)

    def resume(self) -> None:
        self._paused.value = False

    def pause(self, limit_s: float = 60) -> None:
        """Returns when every client has its last answer and has closed its connection."""
        self._paused.value = True
        deadline = time.monotonic() + limit_s
        while not all(self._is_quiet):
            assert time.monotonic() < deadline, "a client waits for its answer"
            time.sleep(_PAUSED_LOOK_S)

    def wait_sent(self, count: int, limit_s: float) -> bool:
        """Until ``count`` requests were sent in all, or the time is over: clients may all be waiting."""
        deadline = time.monotonic() + limit_s
        while self.sent < count:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def _read_records(self) -> None:
        while True:
            try:
                self._on_record(self._records.recv())
            except EOFError:
                return

    # --- in the child ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._records.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the campaign ends us
        expectations = Expectations()
        lock = threading.Lock()
        makers = self._target.askers(expectations)
        threads = [
            threading.Thread(target=self._ask, args=(number, makers[number % len(makers)], self._writer, lock))
            for number in range(self._count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._writer.close()
        os._exit(0)  # grpcio's threads may take long to end

    def _ask(self, number: int, make: Callable[[], Asking], writer: Connection, lock: Any) -> None:
        asker = make()
        count = 0
        due = time.monotonic()
        while not self._ended.value:
            self._is_quiet[number] = False  # before the look, so that `pause` cannot see us quiet and asking
            if self._paused.value:
                asker.close()
                self._is_quiet[number] = True
                time.sleep(_PAUSED_LOOK_S)
                continue
            id = f"{number}-{count}"
            count += 1
            sent_at = time.monotonic()
            seen = asker.ask(id)
            if seen.outcome != ledger.UNREACHABLE:
                self._sent[number] += 1
            if seen.outcome == ledger.RIGHT:
                self._right[number] += 1
            else:
                record = Record(id, asker.name, asker.model, sent_at, time.monotonic(), *seen)
                with lock:
                    writer.send(record)
                if seen.outcome == ledger.UNREACHABLE:
                    time.sleep(_UNREACHABLE_PAUSE_S)
            due = max(due + self._interval_s, time.monotonic() - self._interval_s)
            if due > (now := time.monotonic()):
                time.sleep(due - now)
        asker.close()
