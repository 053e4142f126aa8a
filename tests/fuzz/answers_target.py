"""What an engine may write into the ring that a front end reads, hostile or not: how, and the ring's memory.

The front end has requests under way that native code has sent. Whatever is there, it is taken or the link is over;
each request is answered natively or Python's from then on, once, and what is answered natively is HTTP.
"""

from __future__ import annotations

import os
import struct
from typing import Any

from pyserve import _front
from pyserve.fronts.fast_forms import FastForm
from pyserve.telemetry.stage_times import BOUNDS_S

RING_SIZE = 4096
BODY_MAX = 2048
ASKED = 4
FIRST_TICKET = 1 << 62
# Of the first byte: the first 8 bytes are what the writer says that it has written; some clients have gone.
TELLS, GOES = 1, 2
_PATHS = ("/predictions/m", "/predictions/text")
_HEAD = b"HTTP/1.1 200 \r\nx-request-id: "


class _Budget:
    size, quick_max = 0, 1 << 20


class _Connection:
    """What native code asks of a protocol and its transport."""

    def __init__(self, path: _front.FastPath) -> None:
        self.native = _front.FastConnection(path)
        self.native.open(self, self.write, "127.0.0.1:1")
        self.native.is_ready = True
        self.written: list[bytes] = []
        self.handed = self.gone = 0

    def received(self, data: bytes) -> None:
        raise AssertionError("it was not taken")

    def write(self, data: bytes) -> None:
        self.written.append(data)


class _Owner:
    """A door."""

    def take_over_call(self, call: Any) -> None:
        connection, ticket, _, id, listener, _ = call
        assert ticket >= FIRST_TICKET and id == "an-id" and listener == 3
        connection.handed += 1

    def send_cancel(self, ticket: int) -> None:
        raise AssertionError("there is room")


def _frame(output: bytes, is_large: bool) -> tuple[int, bytes, bytes, bytes, bytes, bytes]:
    return 1, _HEAD, b"\r\ncontent-length: ", b"\r\n\r\n", b"", b""


def _form_of(content_type: str, accept: str, codings: str) -> FastForm:
    return FastForm(False, accept == "text", False, True, False, _frame)


def check(data: bytes) -> None:
    flags, content = (data[0], data[1 : RING_SIZE + 1]) if data else (0, b"")
    tail = len(content)
    if flags & TELLS and len(content) >= 8:
        tail = struct.unpack_from("<Q", content)[0]
        content = content[8:]
    memory, wake = os.memfd_create("fuzz"), os.eventfd(0, os.EFD_NONBLOCK)
    try:
        os.ftruncate(memory, 2 * (_front.STATE_SIZE + RING_SIZE))
        os.pwrite(memory, struct.pack("<Q", tail), 0)
        os.pwrite(memory, content, _front.STATE_SIZE)
        _check(memory, wake, flags)
    finally:
        os.close(memory)
        os.close(wake)


def _check(memory: int, wake: int, flags: int) -> None:
    door = _front.FastDoor(_Owner())
    door.attach(_front.Writer(memory, _front.STATE_SIZE + RING_SIZE, RING_SIZE), wake)
    reader = _front.Reader(memory, 0, RING_SIZE, body_size_max=BODY_MAX, coming_size_max=BODY_MAX, keeps_bodies=False)
    door.read_from(reader)
    budget = _Budget()
    path = _front.FastPath(
        door, listener=3, answer_size_max=BODY_MAX, budget=budget, call_soon=lambda call: None, log=None,
        head_size_max=4096, line_size_max=4096, header_count_max=20, body_size_max=100, takes_ids=True,
        coded_size_min=0, json_size_max=100,
    )  # fmt: skip
    routes = {
        each: _front.FastRoute(
            0, size=4, row_of=lambda request: None, bounds=BOUNDS_S, describes_items=False, form_of=_form_of,
            log_head="", kind="f", shape=[1], takes_json=False,
        ) for each in _PATHS
    }  # fmt: skip
    path.set(1, routes, None)
    asked = [_Connection(path) for _ in range(ASKED)]
    for number, each in enumerate(asked):
        accept = b"text" if number % 2 else b"raw"
        each.native.receive(
            b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Type: application/octet-stream\r\nAccept: %b\r\n"
            b"x-request-id: an-id\r\nContent-Length: 4\r\n\r\n\x00\x00\x80\x3f" % (_PATHS[0].encode(), accept)
        )
    assert path.request_count == door.count == ASKED and budget.size == 4 * ASKED
    gone = asked[: 1 + flags % 3] if flags & GOES else []
    for each in gone:
        each.native.close()
    try:
        for _ in range(RING_SIZE):
            for _, _, _, head, body in reader.take(2):
                assert len(head) <= RING_SIZE and len(body) <= BODY_MAX
            if reader.sleep():
                break
    except ValueError as error:
        assert 0 < len(str(error)) < 2000
    door.detach()
    for each in asked:
        assert len(each.written) + each.handed == (each not in gone) and not each.native.is_busy
        for answer in each.written:
            head, _, body = answer.partition(b"\r\n\r\n")
            assert answer.startswith(_HEAD + b"an-id\r\n") and head.endswith(b": %d" % len(body))
    # What was handed over is given back with its exchange.
    assert budget.size == 4 * sum(each.handed for each in asked) and door.count == 0
