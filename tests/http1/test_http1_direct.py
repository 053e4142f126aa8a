"""Large bodies, which are read straight into their place: the same requests and answers as read piece by piece."""

from __future__ import annotations

import asyncio
import random
import ssl
from pathlib import Path

import pytest
import uvloop

from pyserve.config.config import Config
from pyserve.http1 import protocol as http1
from pyserve.http1.connections import Connections
from pyserve.http1.direct import DIRECT_SIZE_MIN, DirectBody
from pyserve.http1.limits import Http1Limits
from pyserve.http1.protocol import Http1Protocol
from pyserve.http1.tls import Http1TlsProtocol
from pyserve.request.body_budget import Account, BodyBudget
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Response
from pyserve.security import tls
from tests.support import certificates
from tests.support.http1_wire import Wire, parse_answers, send_every_way

SIZE = 3 * DIRECT_SIZE_MIN
BODY = random.Random(1).randbytes(SIZE)
SMALL = b"POST /small HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
LIMIT_S = 60.0


def post(body: bytes, *headers: str) -> bytes:
    return "\r\n".join(["POST / HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


def is_direct(wire: Wire) -> bool:
    return isinstance(wire.transport.protocol, DirectBody)


def test_a_large_body_has_a_protocol_of_its_own_to_its_end() -> None:
    wire = Wire()
    sent = post(BODY)
    wire.send(sent[:1000])
    assert is_direct(wire)
    wire.send(sent[1000:-1])
    assert is_direct(wire) and not wire.exchanges
    wire.send(sent[-1:])
    assert not is_direct(wire) and wire.transport.reading
    assert wire.answer.body == BODY
    assert wire.exchanges[0].protocol_bytes == len(sent)
    wire.exchanges[0].request.body.extend(b"!")  # nobody holds on to its memory


def test_what_follows_a_large_body_is_not_lost(seed: int) -> None:
    chance = random.Random(seed)
    sent = post(BODY) + SMALL + post(BODY[::-1]) + post(BODY) + SMALL
    for _ in range(20):
        places = sorted(chance.sample(range(1, len(sent)), chance.randrange(1, 12)))
        wire = Wire().send(*(sent[i:j] for i, j in zip([0, *places], [*places, len(sent)], strict=True)))
        assert [answer.body for answer in wire.answers] == [BODY, b"hi", BODY[::-1], BODY, b"hi"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        post(b"abc") + SMALL,
        post(b"abc", "Connection: close") + b"more",
        post(b"abc", "Expect: 100-continue"),
        post(b"abc", "Content-Encoding: gzip") + SMALL,
        SMALL + post(b"a") + post(b"abcdefgh") + b"NO HTTP\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + SMALL,
    ],
)
def test_the_verdict_is_the_same_when_every_body_is_read_so(
    request_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Wire().send(request_bytes)
    monkeypatch.setattr(http1, "DIRECT_SIZE_MIN", 1)
    assert send_every_way(request_bytes).verdict == plain.verdict


def test_a_pipeline_that_is_full_after_a_large_body_is_read_on_later() -> None:
    wire = Wire(app=None, limits=Http1Limits(pipeline_max=1))
    wire.send(post(BODY))
    assert not wire.transport.reading
    wire.exchanges[0].respond(Response(200, b"ok"))
    assert wire.transport.reading
    wire.send(SMALL)
    assert [exchange.request.path for exchange in wire.exchanges] == ["/", "/small"]


def test_a_client_that_stops_within_a_large_body_is_told() -> None:
    wire = Wire().send(post(BODY)[:1000], post(BODY)[1000:-5])
    assert is_direct(wire)
    wire.advance(1000.0)
    assert wire.statuses == [408] and not is_direct(wire)
    assert wire.connections is not None and wire.connections.budget.size == 0


def test_a_connection_that_ends_within_a_large_body_is_told() -> None:
    wire = Wire().send(post(BODY)[:1000], post(BODY)[1000:-5]).send_eof()
    assert wire.statuses == [400] and not wire.exchanges
    assert wire.connections is not None and wire.connections.budget.size == 0


def test_a_request_that_was_read_before_the_connection_was_cut_off_changes_nothing() -> None:
    wire = Wire(app=None, limits=Http1Limits(pipeline_max=1))
    wire.send(SMALL + post(BODY)[:1000])
    wire.transport.closed = True  # cut off, and the protocol is told in the next turn of the loop
    wire.exchanges[0].respond(Response(200, b"ok"))
    assert not is_direct(wire)
    wire.transport.lose()
    assert wire.connections is not None and wire.connections.budget.size == 0


@pytest.mark.parametrize("missing", [0, 5])
def test_a_client_that_is_gone_leaves_nothing(missing: int) -> None:
    sent = post(BODY)
    wire = Wire(app=None).send(sent[:1000], sent[1000 : len(sent) - missing])
    wire.transport.lose()
    assert all(exchange.disconnected for exchange in wire.exchanges)
    assert wire.connections is not None and (wire.connections.budget.size, len(wire.connections)) == (0, 0)
    assert wire.loop.timer_count == 0


def test_a_client_that_is_gone_in_the_turn_that_brings_the_end_leaves_nothing() -> None:
    wire = Wire().send(post(BODY)[:1000], post(BODY)[1000:-5])
    place = wire.transport.protocol.get_buffer(100)
    place[:5] = BODY[-5:]
    wire.transport.protocol.buffer_updated(5)
    wire.protocol.connection_lost(None)
    wire.loop.advance()
    assert not wire.exchanges
    assert wire.connections is not None and wire.connections.budget.size == 0


# --- over sockets -----------------------------------------------------------------------------------------------------


def add_mark(exchange: Exchange) -> None:
    body = exchange.request.body
    body.append(33)  # a handler may change it
    answer = Response(200, b"")
    answer.tail = [memoryview(body)[:10], memoryview(body)[10:]]
    exchange.respond(answer)


async def ask_in_turn(bodies: list[bytes], folder: Path | None, budget: BodyBudget | None = None) -> bytes:
    """All that comes back for ``bodies``, sent at once over one connection, which is TLS' if there is a folder."""
    limits = Http1Limits()
    connections = Connections(limits, budget)
    kind, context, trust = Http1Protocol, None, None
    if folder is not None:
        pair = certificates.self_signed(folder)
        context = tls.server_context(Config(private_key_file=str(pair.key), certificate_file=str(pair.certificate)))
        kind, trust = Http1TlsProtocol, ssl._create_unverified_context()
    server = await asyncio.get_running_loop().create_server(
        lambda: kind(add_mark, limits, connections), "127.0.0.1", 0, ssl=context
    )
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), ssl=trust)
    writer.writelines(post(body) for body in bodies[:-1])
    writer.write(post(bodies[-1], "Connection: close"))
    output = await reader.read()
    writer.close()
    server.close()
    assert connections.budget.size == 0
    return output


@pytest.mark.parametrize("is_tls", [False, True])
def test_large_and_small_bodies_in_turn_over_one_connection(tmp_path: Path, is_tls: bool) -> None:
    big = random.Random(2).randbytes(1_500_000)
    bodies = [big, b"hi", BODY, b"", big[::-1]]
    output = uvloop.run(asyncio.wait_for(ask_in_turn(bodies, tmp_path if is_tls else None), LIMIT_S))
    assert [answer.body for answer in parse_answers(output)] == [body + b"!" for body in bodies]


@pytest.mark.parametrize("is_tls", [False, True])
def test_bodies_that_are_over_the_budget_are_read_over(tmp_path: Path, is_tls: bool) -> None:
    """The budget is used up while they come, as others take it."""
    big = random.Random(2).randbytes(1_500_000)
    bodies = [b"hi", big, BODY, big, b"ho"]

    class Busy(BodyBudget):
        def will_have_room(self, account: Account, size: int) -> bool:
            return True

    output = uvloop.run(asyncio.wait_for(ask_in_turn(bodies, tmp_path if is_tls else None, Busy(600_000)), LIMIT_S))
    answers = parse_answers(output)
    assert [answer.status for answer in answers] == [200, 503, 200, 503, 200]
    assert [answer.body for answer in answers if answer.status == 200] == [b"hi!", BODY + b"!", b"ho!"]
