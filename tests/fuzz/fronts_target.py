"""What a front end may write into its ring, hostile or not: a byte that says how, and the ring's memory.

The engine's side reads it: frames, requests, tensors for a lane that runs, counts. Whatever is there, it is taken or
the link is over; nothing of it stays behind, and no answer goes to a number that was not there.
"""

from __future__ import annotations

import functools
import os
import select
import struct
import tempfile
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from pyserve import _core, _front
from pyserve.fronts import wire
from pyserve.fronts.channel import RubbishError
from pyserve.fronts.link import Link
from pyserve.fronts.shares import Shares
from pyserve.request.body_budget import BodyBudget
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat, Response

RING_SIZE = 4096
GENERATION, NUMBERS = 3, 4
BODY_MAX = 2048
SHARES = Shares(
    process_count=3, body_budget_size=2 * BODY_MAX, connection_count_max=10, in_flight_max=8, body_size_max=BODY_MAX,
    answer_size_max=BODY_MAX, waiting_size_max=BODY_MAX,
)  # fmt: skip
# Of the first byte: the first 8 bytes are what the writer says that it has written; requests stay unanswered; tensors
# are run before the front end goes.
TELLS, KEEPS, RUNS = 1, 2, 4
_BOUNDS = [0.1, 1.0]


class _Owner:
    """The lane's part that is Python's."""

    def __init__(self, lane: _core.Lane):
        self._lane = lane
        self.cancelled = 0

    def watch_rows(self) -> None:
        """Nothing is over its time here."""

    def adopt(self, link: Link, ticket: int, head: bytes, url_version: str) -> None:
        link.adopt(ticket, head)

    def row_cancelled(self, url_version: str) -> None:
        self.cancelled += 1


class _Engine:
    """A lane that answers what it gets, and the way there."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path, example = Path(folder) / "same.pt", [torch.zeros(1, NUMBERS)]
            torch.jit.save(torch.jit.trace(torch.nn.Identity(), example[0]), str(path))
            self.engine = _core.Engine()
            self.lane = _core.Lane(self.engine, _core.TorchModel.load(str(path), example), example, 64)
        self.lane.set_limits(batch_size_max=4, batch_size_min=1, batch_delay_max_ns=0, running_max=1)
        self.lane.set_workers(1)
        self.owner = _Owner(self.lane)
        self.rows = _core.LaneRows(self.lane, weakref.ref(self.owner), _BOUNDS, _BOUNDS)
        self.rows.set_limits(is_open=True, waiting_max=32, queue_limit_ns=1 << 60, answer_size_max=1 << 20)
        self.table = _core.RowTable()
        self.table.set(GENERATION, [(self.rows, "default")])
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)
        while not self.lane.ready_count:
            self.drain(10)

    def drain(self, wait_ms: int) -> None:
        select.select([self.engine.fileno()], [], [], wait_ms / 1e3)
        self.engine.drain()


@functools.cache
def _engine() -> _Engine:
    return _Engine()


class _Channel:
    """Of the engine's end what a link asks of it."""

    waiting_size = 0

    def __init__(self, reader: Any):
        self.reader = reader
        self.given_up = ""
        self.answered: list[int] = []

    def send(self, kind: int, flags: int, ticket: int, head: bytes = b"", body: Any = b"") -> None:
        self.answered.append(ticket)

    def send_parts(self, kind: int, flags: int, ticket: int, head: bytes, parts: Any) -> None:
        self.answered.append(ticket)

    def give_up(self, reason: str) -> None:
        self.given_up = reason


def check(data: bytes) -> None:
    flags, content = (data[0], data[1 : RING_SIZE + 1]) if data else (0, b"")
    tail = len(content)
    if flags & TELLS and len(content) >= 8:
        tail = struct.unpack_from("<Q", content)[0]
        content = content[8:]
    memory = os.memfd_create("fuzz")
    try:
        os.ftruncate(memory, 2 * (_front.STATE_SIZE + RING_SIZE))
        os.pwrite(memory, struct.pack("<Q", tail), 0)
        os.pwrite(memory, content, _front.STATE_SIZE)
        _check(memory, flags)
    finally:
        os.close(memory)


def _check(memory: int, flags: int) -> None:
    engine, answers = _engine(), _front.STATE_SIZE + RING_SIZE
    reader = _core.Reader(memory, 0, RING_SIZE, body_size_max=BODY_MAX, coming_size_max=BODY_MAX, keeps_bodies=True)
    tickets: set[int] = set()

    def answer(exchange: Exchange) -> None:
        if not flags & KEEPS:
            exchange.respond(Response(200, bytes(exchange.request.body)))

    link = Link(0, [answer], BodyBudget(BODY_MAX), SHARES, Counter(), ErrorFormat(), lambda: None)
    channel: Any = _Channel(reader)
    link.channel = channel
    writer = _core.Writer(memory, answers, RING_SIZE)
    link.rows = rows = _core.FrontRows(link, writer, engine.wake, engine.table, count_max=8, size_max=1024)
    rows.read_from(reader)
    try:
        for _ in range(RING_SIZE):
            for kind, status, ticket, head, body in reader.take(2):
                assert len(head) <= RING_SIZE and len(body) <= BODY_MAX
                tickets.add(ticket)
                link.take(kind, status, ticket, head, body)
            if reader.sleep() or channel.given_up:
                break
        while flags & RUNS and rows.count:
            engine.drain(10)
    except (RubbishError, ValueError) as error:
        assert 0 < len(str(error)) < 2000
    assert link.in_flight <= SHARES.in_flight_max + rows.count and rows.size == rows.count * 4 * NUMBERS
    before = engine.owner.cancelled
    left = rows.count
    link.lose()
    assert engine.owner.cancelled - before == left and rows.count == rows.size == link.in_flight == 0
    engine.lane.announce()  # of what came before the rubbish nobody has told a worker
    while engine.lane.running or engine.lane.queue_size:
        engine.drain(10)
    assert engine.rows.count == 0
    assert flags & RUNS or set(channel.answered) <= tickets, "an answer to nobody"
    _check_answers(memory, answers)


def _check_answers(memory: int, offset: int) -> None:
    """What the engine wrote by itself is right, whatever it was asked."""
    frames = _front.Reader(memory, offset, RING_SIZE, body_size_max=BODY_MAX, coming_size_max=0, keeps_bodies=False)
    for kind, _, _, head, body in frames.take(RING_SIZE):
        assert kind in (wire.ROW_ANSWER, wire.AGAIN)
        assert kind == wire.AGAIN or (head == b"f%d" % NUMBERS and len(body) == 4 * NUMBERS)
