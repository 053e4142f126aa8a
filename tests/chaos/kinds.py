"""The kinds of requests over HTTP, each with its right answer."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.chaos import ledger, models
from tests.chaos.http_client import Failure, HttpClient, Reply
from tests.chaos.ledger import Expectations

CURRENT, OTHER = "1.0", "2.0"
_RAW = ("Content-Type", "application/octet-stream")
_FILLER = hashlib.shake_256(b"chaos").digest(300_000)
_SIZES = (40, 300, 3_000, 5_000, 20_000, 200_000)


class Seen(NamedTuple):
    """What came of one request, as in `tests.chaos.ledger.Record`."""

    outcome: str
    status: int = 0
    detail: str = ""


def numbers_of(id: str) -> tuple[int, int, int, int]:
    """Four numbers below 4096; no two ids of a campaign share them."""
    lane, _, number = id.rpartition("-")
    count = int(number)
    return count & 4095, count >> 12 & 4095, zlib.crc32(lane.encode()) & 4095, zlib.crc32(id.encode()) & 4095


class Kind(ABC):
    """One kind of requests.

    Attributes:
        name: of the kind; model: whom it asks.
    """

    name: str
    model: str

    def __init__(self, client: HttpClient, expectations: Expectations):
        self._client = client
        self._expectations = expectations

    @abstractmethod
    def ask(self, id: str) -> Seen:
        """Sends the request of this id and judges its answer."""

    def close(self) -> None:
        self._client.close()

    def _exchange(self, id: str, body: bytes, *headers: tuple[str, str]) -> Reply | Seen:
        """The answer with status 200, or what came instead."""
        try:
            reply = self._client.ask("POST", f"/predictions/{self.model}", body, ("x-request-id", id), *headers)
        except Failure as failure:
            return Seen(failure.outcome, 0, str(failure))
        if reply.headers.get("x-request-id", id) != id:
            return Seen(ledger.SWAPPED, reply.status, f"answered with the id {reply.headers['x-request-id']}")
        if reply.status != 200:
            return Seen(ledger.REFUSED, reply.status, reply.body[:400].decode("utf-8", "replace"))
        return reply

    def _judge(self, id: str, got: bytes, expected: bytes, other: bytes | None = None) -> Seen:
        """Args: other: the answer of the model's other version."""
        if got == expected:
            return Seen(ledger.RIGHT, 200)
        if got == other:
            return Seen(ledger.OTHER_VERSION, 200)
        return Seen(self._expectations.name(got, id), 200, f"expected {expected[:150]!r}, got {got[:300]!r}")


class Linear(Kind):
    """Raw numbers, to the native lane."""

    name, model = "linear", "linear"

    def ask(self, id: str) -> Seen:
        numbers = numbers_of(id)
        expected = models.mixed(numbers, CURRENT)
        self._expectations.remember(id, [expected])
        reply = self._exchange(id, struct.pack("<4f", *numbers), _RAW)
        if isinstance(reply, Seen):
            return reply
        return self._judge(id, reply.body, expected, models.mixed(numbers, OTHER))


class Echo(Kind):
    """Bytes of six sizes and their hash, to a Python handler; above 4 KiB they go through shared memory."""

    name, model = "echo", "echo"

    @staticmethod
    def payload(id: str) -> bytes:
        chance = zlib.crc32(id.encode())
        start = chance % 100_000
        content = id.encode() + b":" + _FILLER[start : start + _SIZES[chance // 7 % len(_SIZES)]]
        return hashlib.sha256(content).hexdigest().encode() + b":" + content

    def ask(self, id: str) -> Seen:
        payload = self.payload(id)
        self._expectations.remember(id, [payload[:64]])
        reply = self._exchange(id, payload, _RAW)
        if isinstance(reply, Seen):
            return reply
        if reply.body == payload:
            return Seen(ledger.RIGHT, 200)
        return Seen(self._expectations.name(reply.body[:64], id), 200,
                    f"{len(reply.body)} bytes for {len(payload)}: {reply.body[:200]!r}")  # fmt: skip


@dataclass
class _Palette:
    """The right answer for each colour; learned from the first answer, whose best class must be the right one."""

    answers: dict[int, bytes] = field(default_factory=dict)


class Pictures(Kind):
    """PNG files, each one of its own by a comment within it, to the image classifier."""

    name, model = "pictures", "pictures"
    palette = _Palette()

    def ask(self, id: str) -> Seen:
        colour = zlib.crc32(id.encode()) % models.COLOURS
        reply = self._exchange(id, models.picture(colour, id))
        if isinstance(reply, Seen):
            return reply
        expected = self.palette.answers.get(colour)
        if expected is None:
            scores = json.loads(reply.body)
            best = max(scores, key=scores.__getitem__)
            if best != f"colour {colour}":
                return Seen(ledger.WRONG, 200, f"colour {colour}: {reply.body!r}")
            self._expectations.remember(f"any picture of colour {colour}", [reply.body])
            expected = self.palette.answers[colour] = reply.body
        if reply.body == expected:
            return Seen(ledger.RIGHT, 200)
        return Seen(self._expectations.name(reply.body, f"any picture of colour {colour}"), 200,
                    f"expected {expected!r}, got {reply.body!r}")  # fmt: skip


class Stream(Kind):
    """A handler that answers in parts."""

    name, model = "stream", "streamer"

    def ask(self, id: str) -> Seen:
        expected = "".join([*(f"{id} part {part};" for part in range(4)), f"{id} end"]).encode()
        self._expectations.remember(id, [expected])
        reply = self._exchange(id, id.encode(), _RAW)
        return reply if isinstance(reply, Seen) else self._judge(id, reply.body, expected)


class Sequences(Kind):
    """Sums of sequences of eight numbers, each sequence with one worker; what disturbs one ends it."""

    name, model = "sequence", "adder"
    LENGTH = 8

    def __init__(self, client: HttpClient, expectations: Expectations):
        super().__init__(client, expectations)
        self._id = ""
        self._numbers: list[int] = []

    def ask(self, id: str) -> Seen:
        # A server that was started again does not know the sequence; its client does know that the connection ended.
        starts = not self._numbers or not self._client.is_open()
        if starts:
            self._numbers = []
            self._id = f"sequence-{id}"
        number = zlib.crc32(id.encode()) % 1000
        ends = len(self._numbers) == self.LENGTH - 1
        expected = [] if ends else [*self._numbers, number]
        order = {"add": number, **({"end": self._id} if ends else {})}
        headers = [("Content-Type", "application/json"), ("ts_request_sequence_id", self._id)]
        headers += [("ts_request_sequence_start", "true")] if starts else []
        self._numbers = []  # unless all goes well
        reply = self._exchange(id, json.dumps(order).encode(), *headers)
        if isinstance(reply, Seen):
            return reply
        answer = json.loads(reply.body)
        if answer["id"] != self._id:
            return Seen(ledger.SWAPPED, 200, f"{self._id}: {reply.body[:300]!r}")
        if answer["numbers"] != expected:
            return Seen(ledger.WRONG, 200, f"expected {expected}, got {reply.body[:300]!r}")
        self._numbers = expected
        return Seen(ledger.RIGHT, 200)


HTTP_KINDS: list[type[Kind]] = [Linear, Echo, Pictures, Stream, Sequences]
