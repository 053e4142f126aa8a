"""Both ends of the wire to worker processes as Python sees them: the lane here, the channel in a thread."""

from __future__ import annotations

import gc
import os
import select
import socket
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace, TracebackType
from typing import Any

import pytest
import torch  # noqa: F401 - brings the libraries that the engine needs

from pyserve import _core
from pyserve.lanes import reruns

HANG_S = 60
NEVER = 2**63 - 1
ANSWER, ERROR, CHUNK, LAST = range(4)
LARGE = 300_000  # bytes: in shared memory, and a memoryview in the answer

Work = Callable[[Any, Any], None]


class Owner:
    """What an answer is for."""

    def __init__(self, name: str = ""):
        self.name = name


class Rig:
    """An engine with one lane; workers are threads with channels."""

    def __init__(self, capacity: int = 64, batch_size: int = 4):
        self.engine = _core.Engine()
        self.lane = _core.ProcessLane(self.engine, capacity)
        self.lane.set_limits(batch_size_max=batch_size, batch_size_min=1, batch_delay_max_ns=0, running_max=2**32 - 1)
        self._threads: list[threading.Thread] = []
        self.failures: list[BaseException] = []

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lane.join()
        self.engine.drain()
        for thread in self._threads:
            thread.join(HANG_S)
            assert not thread.is_alive()
        if error is None:
            assert not self.failures

    def wire(self, *, in_flight_max: int = 0) -> tuple[int, Any]:
        """A new worker: its id in the lane, and the channel of its process."""
        ours, theirs = socket.socketpair()
        memories = [os.memfd_create(name) for name in ("requests", "answers")]
        with ours, theirs:
            for fd in memories:
                os.ftruncate(fd, 1 << 20)
            channel = _core.WorkerChannel(theirs.fileno(), *memories)
            worker = self.lane.add_worker(ours.fileno(), *memories, in_flight_max=in_flight_max)
        for fd in memories:
            os.close(fd)
        return worker, channel

    def start(self, work: Work, *, in_flight_max: int = 0) -> int:
        """A worker that does ``work`` for each batch until it is told to stop."""
        worker, channel = self.wire(in_flight_max=in_flight_max)

        def serve(channel: Any) -> None:
            try:
                while True:
                    work(channel, channel.receive())
            except EOFError:
                pass
            except BaseException as error:
                self.failures.append(error)

        thread = threading.Thread(target=serve, args=(channel,))
        thread.start()
        self._threads.append(thread)
        return worker

    def submit(
        self, owner: object, body: Any = b"", *, head: bytes = b"", flags: int = 0, deadline: int = NEVER
    ) -> int:
        return int(self.lane.submit(owner, head, body, flags, time.monotonic_ns(), deadline))

    def completions(self) -> Iterator[Any]:
        """What comes to an end, as it comes."""
        end = time.monotonic() + HANG_S
        while time.monotonic() < end:
            select.select([self.engine], [], [], 0.1)
            yield from self.engine.drain()
        raise AssertionError("nothing came to an end")

    def until(self, condition: Callable[[], bool]) -> list[Any]:
        """Drains until the condition holds. Returns what came."""
        came: list[Any] = []
        end = time.monotonic() + HANG_S
        while True:
            came += self.engine.drain()
            if condition():
                return came
            assert time.monotonic() < end
            select.select([self.engine], [], [], 0.1)

    def row(self, worker: int) -> dict[str, Any]:
        return next(row for row in self.lane.workers() if row["id"] == worker)


def echo(channel: Any, batch: Any) -> None:
    channel.begin(batch.id)
    channel.send(
        batch.id, [(ticket, ANSWER, 200, b"OK\n" + head, bytes(body)) for ticket, _, head, body in batch.items]
    )


def test_answers_come_with_the_owners_they_are_for() -> None:
    with Rig() as rig:
        rig.start(echo)
        owners = [Owner(str(i)) for i in range(50)]
        for owner in owners:
            rig.submit(owner, owner.name.encode() * 10, head=owner.name.encode())
        seen: list[Owner] = []
        for completion in rig.completions():
            assert completion.code == "ok" and not completion.message and not completion.expired
            assert completion.started_at <= completion.finished_at
            for owner, (kind, status, head, body) in zip(completion.owners, completion.answers, strict=True):
                name = owner.name.encode()
                assert (kind, status, head, body) == (ANSWER, 200, b"OK\n" + name, name * 10)
                seen.append(owner)
            if len(seen) == len(owners):
                break
        assert set(seen) == set(owners)
        stats = rig.lane.stats()
        assert stats["submitted"] == 50 and stats["failed"] == stats["cancelled"] == stats["expired"] == 0
        assert stats["batches"] == rig.lane.workers()[0]["batches"] <= 50
        assert rig.lane.running == rig.lane.queue_size == 0


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
def test_large_bodies_pass_both_ways(make: Callable[[bytes], Any]) -> None:
    content = os.urandom(LARGE)
    with Rig() as rig:
        rig.start(echo)
        rig.submit(Owner(), make(content))
        completion = next(rig.completions())
        body = completion.answers[0][3]
        assert isinstance(body, memoryview) and body == content
        del completion  # the memory lives as long as the view of it
        gc.collect()
        assert body == content


def test_the_worker_sees_flags_and_threads_and_a_body_it_may_change() -> None:
    seen: list[tuple[int, bytes, int]] = []

    def work(channel: Any, batch: Any) -> None:
        for _, flags, _, body in batch.items:
            assert isinstance(body, bytearray)
            seen.append((flags, bytes(body), batch.intra_op_threads))
            body.extend(b"!")
        echo(channel, batch)

    with Rig() as rig:
        rig.lane.set_intra_op_threads(3)
        rig.start(work)
        rig.submit(Owner(), b"a", flags=1)
        completion = next(rig.completions())
        assert completion.answers[0][3] == b"a!"
    assert seen == [(1, b"a", 3)]


def test_a_full_queue_refuses_and_has_room_again_when_requests_are_cancelled() -> None:
    with Rig(capacity=4) as rig:
        assert rig.lane.capacity == 4
        owners = [Owner() for _ in range(4)]
        tickets = [rig.submit(owner) for owner in owners]
        refused = Owner()
        references = sys.getrefcount(refused)
        with pytest.raises(OverflowError, match="full"):
            rig.submit(refused)
        assert sys.getrefcount(refused) == references
        assert rig.lane.cancel(tickets[1]) and not rig.lane.cancel(tickets[1])
        assert not rig.lane.cancel(12345) and not rig.lane.cancel(2**63)
        rig.submit(refused)
        dropped = rig.engine.drain()
        assert [completion.code for completion in dropped] == ["cancelled"]
        assert dropped[0].owners == [None] and dropped[0].answers == []


def test_times_tell_what_waits_what_runs_and_what_is_over() -> None:
    may_go, has_come = threading.Event(), threading.Event()

    def work(channel: Any, batch: Any) -> None:
        has_come.set()
        assert may_go.wait(HANG_S)
        echo(channel, batch)

    with Rig(batch_size=1) as rig:
        before = time.monotonic_ns()
        worker = rig.start(work)
        runs, waits = rig.submit(Owner()), rig.submit(Owner())
        late = rig.submit(owner := Owner("late"), deadline=time.monotonic_ns() + 1)
        assert has_come.wait(HANG_S)
        assert before <= rig.lane.started_at(runs) <= time.monotonic_ns()
        assert rig.lane.started_at(waits) == 0
        assert rig.lane.started_at(999_999) == -1
        assert rig.row(worker)["running_since"] >= before and rig.lane.running == 1 and rig.lane.queue_size == 2
        may_go.set()
        came = rig.until(lambda: rig.lane.started_at(waits) == rig.lane.started_at(late) == -1)
        assert [rig.lane.started_at(ticket) for ticket in (runs, waits, late)] == [-1, -1, -1]
        assert [gone for completion in came for gone in completion.expired] == [owner]
        assert rig.lane.stats()["expired"] == 1
        assert rig.row(worker)["running_since"] == 0


def test_the_result_of_a_cancelled_request_has_no_owner_but_a_place() -> None:
    may_go = threading.Event()

    def work(channel: Any, batch: Any) -> None:
        assert may_go.wait(HANG_S)
        echo(channel, batch)

    with Rig(batch_size=1) as rig:
        rig.start(work)
        gone = rig.submit(Owner())
        assert rig.lane.cancel(gone)
        may_go.set()
        completion = next(rig.completions())
        assert completion.owners == [None] and len(completion.answers) == 1


@pytest.mark.parametrize("in_flight_max", [0, 4])
def test_parts_of_a_stream_come_one_by_one_and_end_with_the_last(in_flight_max: int) -> None:
    cancelled = threading.Event()

    def work(channel: Any, batch: Any) -> None:
        channel.begin(batch.id)
        ((ticket, _, head, _),) = batch.items
        part = 0
        while part < 3 or (head == b"endless" and not channel.is_cancelled(ticket)):
            channel.send(batch.id, [(ticket, CHUNK, 201, b"OK" if part == 0 else b"", f"part {part}".encode())])
            part += 1
        if head == b"endless":
            cancelled.set()
        channel.send(batch.id, [(ticket, LAST, 201, b"", b"end")])

    with Rig(batch_size=1) as rig:
        rig.start(work, in_flight_max=in_flight_max)
        rig.submit(owner := Owner())
        came: list[tuple[Any, ...]] = []
        for completion in rig.completions():
            assert completion.owners == [owner]
            came.append((completion.code, *completion.answers[0]))
            if completion.code == "ok":
                break
        assert came == [
            ("chunk", CHUNK, 201, b"OK", b"part 0"),
            ("chunk", CHUNK, 201, b"", b"part 1"),
            ("chunk", CHUNK, 201, b"", b"part 2"),
            ("ok", LAST, 201, b"", b"end"),
        ]
        ticket = rig.submit(Owner(), head=b"endless")
        next(rig.completions())
        assert rig.lane.cancel(ticket)
        late = rig.until(lambda: rig.lane.started_at(ticket) == -1 and cancelled.is_set() and rig.lane.running == 0)
        assert all(owner is None for completion in late for owner in completion.owners)


def test_a_worker_that_hangs_up_answers_for_what_it_began() -> None:
    with Rig(batch_size=2) as rig:
        worker, channel = rig.wire()
        owners = [Owner(), Owner(), Owner()]
        for owner in owners:
            rig.submit(owner)
        batch = channel.receive()
        channel.begin(batch.id)
        assert rig.row(worker)["state"] == "ready" and rig.lane.ready_count == 1
        del channel  # the last of its descriptors
        came = rig.until(lambda: bool(rig.row(worker)["state"] == "died"))
        ended = [(completion.code, completion.message) for completion in came]
        assert ended == [("worker_died", "its connection ended")]
        assert came[0].was_alone == (len(batch.items) == 1)
        assert came[0].owners == owners[: len(batch.items)] and came[0].answers == []
        assert rig.row(worker)["error"] == "its connection ended" and rig.lane.ready_count == rig.lane.running == 0

        rig.lane.remove_worker(worker)
        assert rig.lane.workers() == []
        idle, channel = rig.wire()
        assert idle == worker + 1
        left = len(channel.receive().items)
        del channel
        came = rig.until(lambda: bool(rig.row(idle)["state"] == "died"))
        assert [completion.code for completion in came] == ["not_begun"] and len(came[0].owners) == left
        assert came[0].batch_size == left and not rig.row(idle)["died_in_rerun"]


def test_one_that_was_run_by_itself_is_told_from_those_of_its_batch() -> None:
    with Rig(batch_size=4) as rig:
        owners = [Owner() for _ in range(4)]
        for owner in owners:
            rig.submit(owner)
        worker, channel = rig.wire()
        batch = channel.receive()
        channel.begin(batch.id)
        channel.send(batch.id, [(batch.items[0][0], 0, 200, b"", b"first")])
        assert channel.begin_alone(batch.items[1][0])  # what was sent has left
        del channel
        came = rig.until(lambda: bool(rig.row(worker)["state"] == "died"))
    assert [(each.code, each.was_alone, each.owners) for each in came] == [
        ("ok", False, owners[:1]),
        ("worker_died", True, owners[1:2]),
        ("worker_died", False, owners[2:]),
    ]


def test_a_stopped_worker_finishes_and_its_channel_ends() -> None:
    with Rig() as rig:
        worker, channel = rig.wire()
        assert channel.receive(0) is None and channel.receive(timeout_ms=1) is None
        rig.submit(owner := Owner())
        batch = channel.receive()
        rig.lane.stop_worker(worker)
        rig.lane.stop_worker(worker)
        rig.lane.stop_worker(4711)  # nobody
        assert rig.row(worker)["state"] == "stopping" and rig.lane.ready_count == 0
        echo(channel, batch)
        assert channel.receive(0) is None  # what was sent leaves with the next look
        came = rig.until(lambda: bool(rig.row(worker)["state"] == "stopped"))
        assert [completion.owners for completion in came] == [[owner]]
        for _ in range(2):
            with pytest.raises(EOFError):
                channel.receive()
        assert channel.is_cancelled(1)
        with pytest.raises(EOFError, match="gone"):
            channel.send(batch.id, [])


def test_answers_of_the_wrong_form_are_refused_and_the_right_ones_still_pass() -> None:
    with Rig() as rig:
        worker, channel = rig.wire()
        rig.submit(owner := Owner())
        batch = channel.receive()
        ticket = batch.items[0][0]
        for answers, error, text in [
            ([(ticket, ANSWER, 200, b"")], ValueError, "an answer is"),
            ([None], ValueError, "an answer is"),
            ([(ticket, 4, 200, b"", b"")], ValueError, "0, 1, 2 or 3, not 4"),
            ([("x", ANSWER, 200, b"", b"")], TypeError, "three numbers"),
            ([(-1, ANSWER, 200, b"", b"")], TypeError, "three numbers"),
            ([(ticket, ANSWER, 70_000, b"", b"")], TypeError, "three numbers"),
            ([(ticket, ANSWER, 200, None, b"")], TypeError, "three numbers"),
            ([(ticket, ANSWER, 200, b"", "text")], TypeError, "bytes-like"),
            ([(ticket, ANSWER, 200, b"x" * (2**20 + 1), b"")], ValueError, "1048576"),
        ]:
            with pytest.raises(error, match=text):
                channel.send(batch.id, answers)
        assert rig.engine.drain() == [] and rig.row(worker)["state"] == "ready"
        echo(channel, batch)
        assert channel.receive(0) is None
        assert next(rig.completions()).owners == [owner]


def test_wrong_arguments_are_refused() -> None:
    engine = _core.Engine()
    for capacity in (0, 3):
        with pytest.raises(ValueError, match="power of two"):
            _core.ProcessLane(engine, capacity)
    lane = _core.ProcessLane(engine, 4)
    owner = Owner()
    references = sys.getrefcount(owner)
    with pytest.raises(TypeError, match="bytes-like"):
        lane.submit(owner, b"", "text", 0, 0, NEVER)  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        lane.submit(owner, b"", memoryview(b"abcd")[::2], 0, 0, NEVER)
    with pytest.raises(ValueError, match="head of a request may have 1048576 bytes, not 1048577"):
        lane.submit(owner, b"x" * (2**20 + 1), b"", 0, 0, NEVER)
    assert sys.getrefcount(owner) == references and lane.queue_size == 0
    with pytest.raises((OSError, RuntimeError), match="descriptor"):
        lane.add_worker(-1, -1, -1)
    with pytest.raises((OSError, RuntimeError), match="descriptor"):
        _core.WorkerChannel(-1, -1, -1)
    assert lane.workers() == [] and lane.ready_count == 0


@pytest.mark.parametrize("size", [3, LARGE])
def test_owners_and_bodies_are_let_go_of_however_they_end(size: int) -> None:
    body = bytearray(size)
    references = sys.getrefcount(body)
    gone: list[weakref.ref[Owner]] = []

    def submit(rig: Rig, **options: Any) -> int:
        owner = Owner()
        gone.append(weakref.ref(owner))
        return rig.submit(owner, body, **options)

    with Rig(batch_size=1) as rig:
        submit(rig, deadline=1)
        cancelled = submit(rig)
        rig.lane.cancel(cancelled)
        submit(rig)
        rig.start(echo)
        rig.until(lambda: rig.lane.stats()["batches"] == 1)
        worker, channel = rig.wire()
        rig.lane.stop_worker(rig.lane.workers()[0]["id"])
        submit(rig)
        channel.begin(channel.receive().id)
        submit(rig)
        del channel
        rig.until(lambda: bool(rig.row(worker)["state"] == "died"))
        assert rig.lane.queue_size == 1  # join gives it back
    gc.collect()
    assert [reference() for reference in gone] == [None] * 5
    assert sys.getrefcount(body) == references
    body.extend(b"x")  # nobody holds its buffer


def test_a_lane_that_is_forgotten_with_requests_lets_go_of_them() -> None:
    rig = Rig()
    owner = Owner()
    reference = weakref.ref(owner)
    rig.submit(owner, bytes(LARGE))
    _, channel = rig.wire()
    rig.submit(owner)
    del owner, rig
    gc.collect()
    assert reference() is None
    with pytest.raises(EOFError):
        while channel.receive(HANG_S * 1000) is not None:  # what had been sent
            pass


def test_a_request_that_is_run_again_is_given_to_a_worker_by_itself() -> None:
    again = 1 << 15
    with Rig(batch_size=8) as rig:
        first = [rig.submit(Owner(), flags=again | group << 16 | 4) for group in (0, 1)]
        ordinary = rig.submit(Owner())
        worker, channel = rig.wire()
        batch = channel.receive()
        assert [item[:2] for item in batch.items] == [(first[0], again | 4)]
        assert rig.lane.batch_size_of(first[0]) == 1
        assert rig.lane.batch_size_of(first[1]) == rig.lane.batch_size_of(ordinary) == 0
        echo(channel, batch)
        assert channel.receive(0) is None
        rig.until(lambda: rig.lane.started_at(first[0]) == -1)
        assert [item[0] for item in channel.receive().items] == [ordinary]  # in turn
        assert rig.lane.batch_size_of(ordinary) == 1 and rig.lane.stats()["retried_singly"] == 2
        assert rig.lane.queue_size == 1
        del channel
        rig.until(lambda: bool(rig.row(worker)["state"] == "died"))
        assert not rig.row(worker)["died_in_rerun"]
        worker, channel = rig.wire()
        assert [item[0] for item in channel.receive().items] == [first[1]]
        del channel
        rig.until(lambda: bool(rig.row(worker)["state"] == "died"))
        assert rig.row(worker)["died_in_rerun"]


@pytest.mark.parametrize("count", [1, 16, 17, 1000])
def test_marks_divide_requests_into_groups(count: int) -> None:
    numbers = reruns.GroupNumbers()
    for is_alone in (True, False, True):
        waiting: list[Any] = [SimpleNamespace(flags=4 | reruns.OVERRUN) for _ in range(count)]
        numbers.mark(waiting, is_alone=is_alone)
        groups = [pending.flags >> 16 for pending in waiting]
        assert groups == sorted(groups) and {pending.flags & 0xFFFF for pending in waiting} == {4 | reruns.RERUN}
        sizes = Counter(groups)
        assert len(sizes) == count if is_alone else len(sizes) <= reruns.GROUPS_MAX
        if not is_alone:
            assert max(sizes.values()) == -(-count // reruns.GROUPS_MAX)
    assert groups[0] > 0  # none has the number of one before
