"""The two ends of a link, in one process: what crosses, in which order, and what an end does with rubbish."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from pyserve import _front
from pyserve.fronts.channel import _ROUNDS, FRAMES_MAX, PIECE_SIZE, RING_SIZE, Channel, LinkFiles

BODY_MAX = 3 * RING_SIZE
FRAME = struct.Struct("<IHHQIIQ")
MAGIC = 0x46565350
# Of the ring that the engine reads.
TAIL, BYTES = 0, _front.STATE_SIZE

Message = tuple[int, int, int, bytes, bytes]


class End:
    """One end, and all that came to it."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.reasons: list[str] = []
        self.news = asyncio.Event()
        self.channel: Channel

    def take(self, kind: int, flags: int, ticket: int, head: bytes, body: bytes | bytearray) -> None:
        self.messages.append((kind, flags, ticket, head, bytes(body)))
        self.news.set()

    def end(self, reason: str) -> None:
        self.reasons.append(reason)
        self.news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.news.clear()
            await asyncio.wait_for(self.news.wait(), 30)


class Link:
    """Both ends; ``memory`` is a hostile front end's own view of what they share."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        files = LinkFiles.make()
        self.memory = mmap.mmap(files.memory, 0)
        self.wake = os.dup(files.engine_wake)
        self.engine, self.front_end = End(), End()
        for end, sock, of_it in ((self.engine, ours, files), (self.front_end, theirs, LinkFiles(*map(os.dup, files)))):
            end.channel = Channel(
                loop, sock, of_it, is_engine=end is self.engine, body_size_max=BODY_MAX, coming_size_max=BODY_MAX,
                on_frame=end.take, on_end=end.end,
            )  # fmt: skip

    def write(self, *frames: bytes, tail: int | None = None) -> None:
        """Puts bytes where the engine reads next, without any care, and wakes it."""
        content = b"".join(frames)
        self.memory[BYTES : BYTES + len(content)] = content
        self.memory[TAIL : TAIL + 8] = struct.pack("<Q", len(content) if tail is None else tail)
        os.eventfd_write(self.wake, 1)

    def close(self) -> None:
        self.engine.channel.close()
        self.front_end.channel.close()
        self.memory.close()
        os.close(self.wake)


@asynccontextmanager
async def linked() -> AsyncIterator[Link]:
    link = Link()
    try:
        await asyncio.sleep(0)
        yield link
    finally:
        link.close()


def test_messages_cross_in_order_whatever_their_size(seed: int) -> None:
    rng = random.Random(seed)

    async def run() -> None:
        async with linked() as link:
            sent: list[Message] = []
            for ticket in range(1, 400):
                size = rng.choice([0, 1, 7, 8, 100, 5000, PIECE_SIZE])
                sent.append((1 + ticket % 60, ticket, ticket, rng.randbytes(rng.randrange(300)), rng.randbytes(size)))
                link.front_end.channel.send(*sent[-1])
                link.engine.channel.send(*sent[-1])
            assert link.front_end.channel.waiting_size > 0, "the ring was never full"
            await link.engine.until(lambda: len(link.engine.messages) == len(sent))
            await link.front_end.until(lambda: len(link.front_end.messages) == len(sent))
            assert link.engine.messages == sent == link.front_end.messages
            assert link.front_end.channel.waiting_size == link.engine.channel.waiting_size == 0

    asyncio.run(run())


def test_a_body_larger_than_the_ring_lets_others_pass() -> None:
    async def run() -> None:
        async with linked() as link:
            large = os.urandom(2 * RING_SIZE + 12345)
            link.front_end.channel.send(1, 0, 1, b"large", large)
            link.front_end.channel.send(1, 0, 2, b"small", b"x")
            await link.engine.until(lambda: len(link.engine.messages) == 2)
            assert [message[3] for message in link.engine.messages] == [b"small", b"large"]
            assert link.engine.messages[1][4] == large

    asyncio.run(run())


def test_a_front_end_that_floods_the_engine_leaves_the_others_their_turn() -> None:
    """Between two messages of one end there are at most a turn's messages of another, however many wait there."""

    async def run() -> None:
        async with linked() as flooding, linked() as other:
            order: list[str] = []
            for link, name in ((flooding, "flood"), (other, "other")):
                link.engine.channel._on_frame = lambda *_, name=name: order.append(name)
            for ticket in range(20_000):
                flooding.front_end.channel.send(1, 0, ticket)
                if ticket % 1000 == 0:
                    other.front_end.channel.send(1, 0, ticket)
            while len(order) < 20_020:
                other.front_end.channel.send(1, 0, 1)
                await asyncio.sleep(0)
            flood = "".join("." if name == "flood" else " " for name in order).split()
            assert max(map(len, flood[1:-1])) <= 2 * FRAMES_MAX * _ROUNDS, max(map(len, flood))

    asyncio.run(run())


def test_a_message_that_is_to_be_whole_comes_in_one_frame() -> None:
    async def run() -> None:
        async with linked() as link:
            bodies = [os.urandom(size) for size in (10, PIECE_SIZE, PIECE_SIZE + 1, RING_SIZE // 4, RING_SIZE // 4)] * 3
            for ticket, body in enumerate(bodies):
                link.front_end.channel.send_whole(1, 0, ticket, b"head", body)
            await link.engine.until(lambda: len(link.engine.messages) == len(bodies))
            assert [message[4] for message in link.engine.messages] == bodies
            link.front_end.channel.send_whole(1, 0, 1, b"", bytes(3 * PIECE_SIZE))
            link.front_end.channel.send(1, 0, 2, b"", bytes(3 * PIECE_SIZE))
            reader = link.engine.channel.reader
            assert [frame[2] for frame in reader.take(1)] == [1] and not reader.take(1), "the other one comes in pieces"

    asyncio.run(run())


def test_messages_of_one_ticket_keep_their_order() -> None:
    async def run() -> None:
        async with linked() as link:
            parts = [os.urandom(2 * RING_SIZE), b"a", os.urandom(3 * PIECE_SIZE), b"b"]
            for part in parts:
                link.engine.channel.send(19, 0, 1, b"", part)
            await link.front_end.until(lambda: len(link.front_end.messages) == len(parts))
            assert [message[4] for message in link.front_end.messages] == parts

    asyncio.run(run())


def test_what_was_begun_can_be_taken_back() -> None:
    async def run() -> None:
        async with linked() as link:
            for ticket in (1, 2, 3):
                link.front_end.channel.send(1, 0, ticket, b"", bytes(RING_SIZE))
            for ticket in (1, 2):
                link.front_end.channel.take_back(ticket)
                link.front_end.channel.send(2, 0, ticket)
            await link.engine.until(lambda: len(link.engine.messages) == 3)
            assert sorted(message[:3] for message in link.engine.messages) == [(1, 0, 3), (2, 0, 1), (2, 0, 2)]

    asyncio.run(run())


def test_the_last_words_of_an_end_that_goes_are_read() -> None:
    async def run() -> None:
        async with linked() as link:
            for ticket in range(1000):
                link.engine.channel.send(17, 200, ticket, b"head", b"body")
            link.engine.channel.close()
            await link.front_end.until(lambda: bool(link.front_end.reasons))
            assert [message[2] for message in link.front_end.messages] == list(range(1000))
            assert link.front_end.reasons == ["it has gone"]
            link.front_end.channel.send(1, 0, 1, b"", b"to nobody")  # does nothing

    asyncio.run(run())


def frame(  # noqa: PLR0917 - the members of a frame
    kind: int = 1, ticket: int = 1, head: bytes = b"", body: bytes = b"", total: int | None = None,
    head_size: int | None = None, body_size: int | None = None, magic: int = MAGIC,
) -> bytes:  # fmt: skip
    parts = FRAME.pack(
        magic, kind, 0, ticket, len(head) if head_size is None else head_size,
        len(body) if body_size is None else body_size, len(body) if total is None else total,
    ) + head + body  # fmt: skip
    return parts + bytes(-len(parts) % 8)


@pytest.mark.parametrize(
    ("frames", "tail", "reason"),
    [
        ([b"GET / HTTP/1.1\r\n\r\n" + bytes(32)], None, "bytes that are no frame"),
        ([frame(magic=MAGIC + 1)], None, "bytes that are no frame"),
        ([frame(kind=64)], None, "unknown kind"),
        ([frame(head_size=2**20 + 1)], None, "head that is too long"),
        ([frame(head_size=2**32 - 1, body_size=2**32 - 1)], None, "head that is too long"),
        ([frame(head_size=8)], None, "whose size is not that of its parts"),
        ([frame(body_size=2**32 - 1, total=2**32 - 1)], None, "whose size is not that of its parts"),
        ([frame(body=b"12345678", total=4)], None, "a body that is too long"),
        ([frame(total=BODY_MAX + 1)], None, "a body that is too long"),
        ([frame(total=2**64 - 1)], None, "a body that is too long"),
        ([frame(ticket=1, total=BODY_MAX), frame(ticket=2, total=1)], None, "more bodies at once"),
        ([frame(kind=_front.MORE, body=b"x")], None, "that was not begun"),
        ([frame(total=4), frame(kind=_front.MORE, body=b"12345")], None, "than was announced"),
        ([frame(total=4), frame(kind=_front.MORE)], None, "than was announced"),
        ([frame(total=4), frame(kind=_front.MORE, head=b"x", body=b"1234")], None, "than was announced"),
        ([frame()], 31, "half a frame"),
        ([frame()], RING_SIZE + 8, "place in the ring makes no sense"),
        ([frame()], 2**64 - 8, "place in the ring makes no sense"),
    ],
)  # fmt: skip
def test_rubbish_ends_the_link_and_nothing_else(frames: list[bytes], tail: int | None, reason: str) -> None:
    async def run() -> None:
        async with linked() as link, linked() as other:
            link.write(*frames, tail=tail)
            await link.engine.until(lambda: bool(link.engine.reasons))
            assert len(link.engine.reasons) == 1 and reason in link.engine.reasons[0], link.engine.reasons
            assert not link.engine.channel.is_open
            other.front_end.channel.send(1, 0, 1, b"", b"still there")
            await other.engine.until(lambda: bool(other.engine.messages))

    asyncio.run(run())


def test_a_reader_that_claims_to_have_read_more_than_was_written_is_left() -> None:
    async def run() -> None:
        async with linked() as link:
            head = _front.STATE_SIZE + RING_SIZE + 64  # of the ring that the engine writes
            link.memory[head : head + 8] = struct.pack("<Q", 2**63)
            link.engine.channel.send(17, 200, 1, b"", b"x")
            assert link.engine.reasons == ["the reader's place in the ring makes no sense"]

    asyncio.run(run())


def test_memory_that_changes_all_the_time_breaks_nothing(seed: int) -> None:
    rng = random.Random(seed)

    async def run() -> None:
        ends = 0
        for _ in range(60):
            async with linked() as link:
                valid = b"".join(frame(ticket=ticket, head=b"h", body=rng.randbytes(64)) for ticket in range(200))
                content = bytearray(valid)
                for _ in range(rng.randrange(1, 30)):
                    content[rng.randrange(len(content))] = rng.randrange(256)
                link.write(bytes(content))
                await asyncio.sleep(0)
                await asyncio.sleep(0.001)
                ends += len(link.engine.reasons)
                assert len(link.engine.messages) <= 200 or link.engine.reasons
        assert ends > 20

    asyncio.run(run())


def test_whoever_speaks_on_the_socket_is_left() -> None:
    async def run() -> None:
        async with linked() as link:
            link.front_end.channel._sock.send(b"hello")
            await link.engine.until(lambda: bool(link.engine.reasons))
            assert link.engine.reasons == ["it wrote to the socket, where nothing is said"]

    asyncio.run(run())


def test_the_memory_cannot_be_cut_short() -> None:
    files = LinkFiles.make()
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(files.memory, 0)
    finally:
        for fd in files:
            os.close(fd)
