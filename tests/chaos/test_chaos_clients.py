"""The clients see what a server must never do: each fault is planted, by a server of a few lines."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.chaos import kinds, ledger, models
from tests.chaos.http_client import Failure, HttpClient
from tests.chaos.ledger import Expectations

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nright"


@contextmanager
def answering(*answers: bytes, closes: bool = True) -> Iterator[HttpClient]:
    """A client of a server that takes one connection and sends one of ``answers`` for each request."""
    over = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            for answer in answers:
                connection.recv(1 << 20)
                connection.sendall(answer)
            if not closes:
                over.wait(30)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        client = HttpClient(listener.getsockname(), is_tls=False, limit_s=0.5)
        try:
            yield client
        finally:
            over.set()
            client.close()
            thread.join()


def outcome(ask: Callable[[], object]) -> str:
    with pytest.raises(Failure) as raised:
        ask()
    return raised.value.outcome


def test_a_whole_answer_is_read_and_the_connection_kept() -> None:
    with answering(ANSWER, ANSWER) as client:
        assert [client.ask("GET", "/").body for _ in range(2)] == [b"right", b"right"]


def test_chunks_are_put_together() -> None:
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nrig\r\n2\r\nht\r\n0\r\n\r\n"
    with answering(chunks, ANSWER) as client:
        assert [client.ask("GET", "/").body for _ in range(2)] == [b"right", b"right"]


@pytest.mark.parametrize(
    ("answer", "expected"), [(b"", ledger.LOST), (ANSWER[:10], ledger.CUT), (ANSWER[:-1], ledger.CUT)]
)
def test_no_answer_is_lost_and_half_an_answer_is_cut(answer: bytes, expected: str) -> None:
    with answering(answer) as client:
        assert outcome(lambda: client.ask("GET", "/")) == expected


def test_a_server_that_never_answers_hangs() -> None:
    with answering(b"", closes=False) as client:
        assert outcome(lambda: client.ask("GET", "/")) == ledger.HUNG


@pytest.mark.parametrize("closes", [True, False])
def test_a_second_answer_is_doubled(closes: bool) -> None:
    with answering(ANSWER + ANSWER, closes=closes) as client:
        assert client.ask("GET", "/").body == b"right"
        assert outcome(lambda: client.ask("GET", "/")) == ledger.DOUBLED


def test_a_port_that_nobody_listens_on_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    assert outcome(lambda: HttpClient(address, is_tls=False).ask("GET", "/")) == ledger.UNREACHABLE


def answer_of(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


LINEAR = models.mixed(kinds.numbers_of("0-7"), "1.0")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (answer_of(LINEAR), ledger.RIGHT),
        (answer_of(LINEAR, b"x-request-id: 0-7"), ledger.RIGHT),
        (answer_of(LINEAR, b"x-request-id: 0-8"), ledger.SWAPPED),
        (answer_of(models.mixed(kinds.numbers_of("0-6"), "1.0")), ledger.SWAPPED),
        (answer_of(models.mixed(kinds.numbers_of("0-7"), "2.0")), ledger.OTHER_VERSION),
        (answer_of(LINEAR[:-1] + b"\0"), ledger.WRONG),
        (answer_of(b"", status=b"503 Service Unavailable"), ledger.REFUSED),
    ],
)
def test_an_answer_is_compared_byte_for_byte(answer: bytes, expected: str) -> None:
    expectations = Expectations()
    expectations.remember("0-6", [models.mixed(kinds.numbers_of("0-6"), "1.0")])
    with answering(answer) as client:
        assert kinds.Linear(client, expectations).ask("0-7").outcome == expected


def test_a_sequence_that_lost_a_number_is_wrong() -> None:
    one, two, three = (kinds.zlib.crc32(f"0-{number}".encode()) % 1000 for number in range(3))
    texts = [f'{{"id": "sequence-0-0", "numbers": {numbers}}}' for numbers in ([one], [one, two], [one, three])]
    with answering(*(answer_of(text.encode()) for text in texts)) as client:
        kind = kinds.Sequences(client, Expectations())
        assert [kind.ask(f"0-{number}").outcome for number in range(3)] == [ledger.RIGHT, ledger.RIGHT, ledger.WRONG]


def test_no_two_ids_share_their_numbers() -> None:
    ids = [f"{lane}-{count}" for lane in range(20) for count in range(3000)]
    assert len({kinds.numbers_of(id) for id in ids}) == len(ids)
