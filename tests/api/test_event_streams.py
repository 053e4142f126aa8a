"""Server-sent events, Triton's generate extension and compressed answers, from a real server."""

from __future__ import annotations

import gzip
import json
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

from pyserve.api import event_streams
from pyserve.api.event_streams import EventStream, event, predict
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request, Response
from pyserve.request.relay import Relay
from tests.support.fakes import FakeLoop
from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, Answer, Server
from tests.support.serving_models import write_linear, write_pictures

NESTED = '{"text_output": ' + "[" * 5000 + "]" * 5000 + "}"
EVENTS = {"Accept": "text/event-stream"}

# What to yield comes in the body: a list of texts, "!" to fail, "<" for bytes that are no text.
SAYS = """
def say(part):
    if part == "!":
        raise ValueError("no more")
    return b"\\xff\\x00" if part == "<" else part


def handle(data, context):
    if data is None:
        return None
    body = data[0]["body"]
    for part in body["parts"] if isinstance(body, dict) else body:
        yield [say(part)]
"""
# Makes the events itself.
SPEAKS = """
def handle(data, context):
    if data is None:
        return None
    context.set_response_content_type(0, "text/event-stream")
    for part in ("data: mine\\n\\n", "data: [DONE]\\n\\n"):
        yield [part]
"""
ANSWERS = """
import json


def handle(data, context):
    if data is None:
        return None
    context.set_response_header(0, "X-Mine", "yes")
    body = data[0]["body"]
    if isinstance(body, dict) and "answer" in body:
        return [body["answer"]]
    return [json.dumps(body)]
"""
# Yields until its client has gone, and notes that it has.
ENDLESS = """
import time


def handle(data, context):
    if data is None:
        return None
    notes = data[0]["body"]["notes"]
    try:
        while not context.cancelled:
            yield ["more"]
            time.sleep(0.001)
    finally:
        open(notes, "w").write("cancelled")
"""
LONG = "def handle(data, context):\n    return None if data is None else ['many words ' * 10_000] * len(data)\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("events"))
    write_linear(server.store)
    write_pictures(server.store)
    for name, source in (("says", SAYS), ("speaks", SPEAKS), ("answers", ANSWERS), ("endless", ENDLESS),
                         ("long", LONG)):  # fmt: skip
        write_handler(server.store, name, source)
    server.environment["PYSERVE_MAX_RESPONSE_SIZE"] = "200000"
    with server:
        server.start("--models", "all")
        yield server


def ask(server: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
    return server.ask("POST", path, json.dumps(body).encode(), {**JSON, **(headers or {})})


def read_events(text: bytes) -> list[dict[str, str]]:
    """As the standard has them read: (id, event, data)."""
    found, fields = [], dict[str, Any]()
    for line in text.decode().split("\n"):
        if not line:
            if "data" in fields:
                found.append({**fields, "data": "\n".join(fields["data"])})
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                fields.setdefault("data", []).append(value)
            else:
                fields[name] = value
    return found


# --- events -----------------------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.parametrize("path", ["/predictions/says", "/predictions/says/1.0", "/v1/models/says:predict"])
def test_each_part_is_an_event(server: Server, path: str) -> None:
    answer = ask(server, path, ["one", "two\nlines", "", "three\r\nmore\r", "ü"], {**EVENTS, "x-request-id": "me"})
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
    assert "content-encoding" not in answer.headers and answer.headers["transfer-encoding"] == "chunked"
    assert read_events(answer.body) == [
        {"id": "me/1", "data": "one"}, {"id": "me/2", "data": "two\nlines"}, {"id": "me/3", "data": "three\nmore\n"},
        {"id": "me/4", "data": "ü"}, {"event": "end", "data": '{"parts": 4}'},
    ]  # fmt: skip


@pytest.mark.server
def test_a_failure_midway_is_the_last_event(server: Server) -> None:
    answer = ask(server, "/predictions/says", ["one", "two", "!"], EVENTS)
    *parts, failure = read_events(answer.body)
    assert answer.status == 200 and [each["data"] for each in parts] == ["one", "two"]
    told = json.loads(failure["data"])
    assert failure["event"] == "error" and told["code"] == 503 and told["detail"]["exception"] == "ValueError"
    for early in (["!"], ["one", "!"]):  # nothing has left yet
        before = ask(server, "/predictions/says", early, EVENTS)
        assert before.status == 503 and before.json["detail"]["text"] == "no more"
    assert ask(server, "/predictions/nothing", [], EVENTS).status == 404


@pytest.mark.server
def test_bytes_that_are_no_text_are_in_base64(server: Server) -> None:
    first, *_ = read_events(ask(server, "/predictions/says", ["<", "x"], EVENTS).body)
    assert (first["event"], first["data"]) == ("base64", "/wA=")


@pytest.mark.server
@pytest.mark.parametrize(
    ("accept", "has_events"),
    [
        ("text/event-stream", True), ("application/json, text/event-stream", True), ("Text/Event-Stream;q=0.9", True),
        ("text/event-stream, */*;q=0.1", True), ("application/json, text/event-stream;q=0.5", False),
        ("text/event-stream;q=0", False), ("*/*", False), ("text/*", False), ("application/json", False),
    ],
)  # fmt: skip
def test_only_clients_that_name_it_get_events(server: Server, accept: str, has_events: bool) -> None:
    answer = ask(server, "/predictions/says", ["a", "b"], {"Accept": accept})
    assert (answer.headers.get("content-type") == "text/event-stream") == has_events
    assert has_events or answer.body == b"ab"


@pytest.mark.server
def test_an_answer_in_one_piece_is_an_event_for_who_takes_nothing_else(server: Server) -> None:
    alone = ask(server, "/predictions/answers", {"answer": "all"}, EVENTS)
    assert alone.headers["content-type"] == "text/event-stream" and alone.headers["x-mine"] == "yes"
    assert [each["data"] for each in read_events(alone.body)] == ["all", '{"parts": 1}']
    both = ask(server, "/predictions/answers", {"answer": "all"}, {"Accept": "text/event-stream, application/json"})
    assert both.body == b"all"
    one = ask(server, "/predictions/says", ["only"], EVENTS)
    assert [each["data"] for each in read_events(one.body)] == ["only", '{"parts": 1}']


@pytest.mark.server
def test_a_handler_that_makes_its_own_events_is_left_alone(server: Server) -> None:
    assert ask(server, "/predictions/speaks", [], EVENTS).body == b"data: mine\n\ndata: [DONE]\n\n"


@pytest.mark.server
def test_a_stream_that_cannot_be_continued_is_not_begun_again(server: Server) -> None:
    again = ask(server, "/predictions/says", ["a"], {**EVENTS, "Last-Event-ID": "me/1"})
    assert (again.status, again.body) == (204, b"")
    for headers in ({**EVENTS, "Last-Event-ID": "17"}, {"Last-Event-ID": "me/1"}):
        assert ask(server, "/predictions/says", ["a"], headers).status == 200


@pytest.mark.server
@pytest.mark.parametrize("path", ["/predictions/endless", "/v2/models/endless/generate_stream"])
def test_a_client_that_hangs_up_ends_the_handler(server: Server, tmp_path: Path, path: str) -> None:
    notes = tmp_path / "notes"
    body = json.dumps({"notes": str(notes)}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\nContent-Type: application/json\r\n"
    with server.connect() as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        seen = b""
        while seen.count(b"data: ") < 3:
            seen += connection.recv(1 << 16)
        connection.shutdown(socket.SHUT_RDWR)
    server.wait_for(notes.exists, "the handler to end")


# --- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.parametrize("path", ["/v2/models/answers/generate", "/v2/models/answers/versions/1.0/generate"])
def test_generate_brings_the_object_to_the_handler(server: Server, path: str) -> None:
    asked = {"id": "7", "text_input": "Once", "parameters": {"count": 3, "stream": False}}
    answer = ask(server, path, asked)
    about = {"model_name": "answers", "model_version": "1.0"}
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == {**about, "id": "7", "text_output": json.dumps(asked)}
    plain = server.ask("POST", path, b'{"text_input": "a"}', {"Content-Type": "text/plain"})
    assert plain.json == {**about, "text_output": '{"text_input": "a"}'}


@pytest.mark.server
@pytest.mark.parametrize(
    ("said", "members"),
    [
        ("text", {"text_output": "text"}), ("{not json", {"text_output": "{not json"}),
        ({"a": 1}, {"text_output": '{\n  "a": 1\n}'}),
        ({"text_output": "x", "score": 2}, {"text_output": "x", "score": 2}),
        ('{"text_output": NaN}', {"text_output": None}), (NESTED, {"text_output": NESTED}),
        ({"outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}, {"y": [1.0, 2.0]}),
        ({"outputs": [{"name": "y", "datatype": "BYTES", "shape": [1], "data": ["z"]}]}, {"y": "z"}),
    ],
)  # fmt: skip
def test_what_a_handler_answers_becomes_members(server: Server, said: Any, members: dict[str, Any]) -> None:
    answer = ask(server, "/v2/models/answers/generate", {"answer": said}).json
    assert {name: value for name, value in answer.items() if not name.startswith("model_")} == members
    streamed = ask(server, "/v2/models/answers/generate_stream", {"answer": said})
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert [json.loads(each["data"]) for each in read_events(streamed.body)] == [answer]


@pytest.mark.server
def test_generate_joins_what_a_handler_yields_and_the_stream_has_it_in_parts(server: Server) -> None:
    asked = {"id": "7", "text_input": "", "parts": ["one ", "two\n", "three"]}
    about = {"model_name": "says", "model_version": "1.0", "id": "7"}
    assert ask(server, "/v2/models/says/generate", asked).json == {**about, "text_output": "one two\nthree"}
    streamed = ask(server, "/v2/models/says/generate_stream", asked)
    assert streamed.body.count(b"\n") == 2 * streamed.body.count(b"data: ") == 6  # each in one line
    assert [json.loads(each["data"]) for each in read_events(streamed.body)] == [
        {**about, "text_output": part} for part in asked["parts"]
    ]


@pytest.mark.server
def test_failures_of_generate(server: Server) -> None:
    midway = {"text_input": "", "parts": ["a", "b", "!"]}
    whole = ask(server, "/v2/models/says/generate", midway)
    assert whole.status == 503 and whole.json["error"] == "Prediction failed"
    *_, last = read_events(ask(server, "/v2/models/says/generate_stream", midway).body)
    assert json.loads(last["data"])["error"] == "Prediction failed"
    first = ask(server, "/v2/models/says/generate_stream", {"parts": ["!"]})
    assert first.status == 503 and first.headers["content-type"] == "application/json"
    odd = ask(server, "/v2/models/says/generate", {"parts": ["<"]})
    assert odd.status == 503 and "not text" in odd.json["error"]
    *_, last = read_events(ask(server, "/v2/models/says/generate_stream", {"parts": ["a", "<", "b"]}).body)
    assert "not text" in json.loads(last["data"])["error"]
    objects = {"parts": [{"text_output": "a", "n": 1}, {"text_output": "b", "n": 2}]}
    assert "generate_stream" in ask(server, "/v2/models/says/generate", objects).json["error"]
    large = ask(server, "/v2/models/says/generate", {"parts": ["x" * 90_000] * 3})
    assert large.status == 503 and "max_response_size=200000" in large.json["error"]


@pytest.mark.server
def test_built_in_handlers_get_their_inputs_by_name(server: Server) -> None:
    plain = server.predict("linear", [1, 2, 3, 4]).json
    for asked in (
        {"input0": [1, 2, 3, 4]}, {"input0": [[1, 2, 3, 4]], "parameters": {"x": 1}},
        {"parameters": {"input0": [1, 2, 3, 4]}},
    ):  # fmt: skip
        answer = ask(server, "/v2/models/linear/generate", asked).json
        assert answer["model_name"] == "linear" and answer["output0"] == pytest.approx(plain)
    (only,) = read_events(ask(server, "/v2/models/linear/generate_stream", {"input0": [1, 2, 3, 4]}).body)
    assert json.loads(only["data"])["output0"] == pytest.approx(plain)


@pytest.mark.server
@pytest.mark.parametrize(
    ("model", "body", "refusal"),
    [
        ("answers", b"x", (400, "not JSON")), ("answers", b"[1]", (400, "JSON object")), ("answers", b"", (400, "")),
        ("answers", b'{"parameters": 1}', (400, "parameters")), ("answers", b'{"id": 1}', (400, '"id"')),
        ("none", b"{}", (404, "none")), ("linear", b'{"text_input": "a"}', (400, "'text_input' that nothing reads")),
        ("linear", b"{}", (400, "no 'input0'")), ("linear", b'{"input0": "a"}', (400, "list of numbers")),
        ("linear", b'{"input0": [1, 2]}', (400, "shape")),
        ("linear", b'{"input0": [[1, 2, 3, 4], [1]]}', (400, "nested")),
        ("linear", b'{"input0": [1, 2, 3, "a"]}', (400, "no FP32")), ("linear", b'{"input0": []}', (400, "")),
        ("pictures", b'{"text_input": "no picture"}', (400, "")), ("pictures", b'{"text_input": 7}', (400, "a string")),
        ("pictures", b'{"text_input": [["a"]]}', (400, "list of strings")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["generate", "generate_stream"])
def test_bad_objects_are_refused(server: Server, verb: str, model: str, body: bytes, refusal: Any) -> None:
    status, word = refusal
    answer = server.ask("POST", f"/v2/models/{model}/{verb}", body, JSON)
    assert answer.status == status and word in answer.json["error"], answer.body
    assert server.ask("GET", f"/v2/models/linear/{verb}").status == 405


@pytest.mark.server
def test_generate_reads_compressed_objects(server: Server) -> None:
    body = json.dumps({"answer": "x"}).encode()
    for coding, packed in (("gzip", gzip.compress(body, mtime=0)), ("deflate", zlib.compress(body))):
        answer = server.ask("POST", "/v2/models/answers/generate", packed, {**JSON, "Content-Encoding": coding})
        assert answer.json["text_output"] == "x"
    assert ask(server, "/v2/models/answers/generate", {}, {"Content-Encoding": "br"}).status == 415


# --- compressed answers -----------------------------------------------------------------------------------------------


@pytest.mark.server
def test_answers_are_compressed_for_who_asks(server: Server) -> None:
    plain = ask(server, "/predictions/long", 1)
    assert "content-encoding" not in plain.headers and plain.headers["vary"] == "Accept-Encoding"
    packed = ask(server, "/predictions/long", 1, {"Accept-Encoding": "gzip, deflate"})
    assert packed.headers["content-encoding"] == "gzip" and int(packed.headers["content-length"]) == len(packed.body)
    assert gzip.decompress(packed.body) == plain.body and len(packed.body) < 2000
    small = ask(server, "/predictions/answers", {"answer": "x"}, {"Accept-Encoding": "gzip"})
    assert "content-encoding" not in small.headers and "vary" not in small.headers
    parts = ask(server, "/predictions/says", ["x" * 10_000] * 3, {"Accept-Encoding": "gzip"})
    assert "content-encoding" not in parts.headers and len(parts.body) == 30_000
    metrics = server.ask("GET", "/metrics", headers={"Accept-Encoding": "gzip"}, port="metrics")
    assert b"ts_inference_requests_total" in gzip.decompress(metrics.body)


@pytest.mark.server
@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_tritons_client_reads_what_it_asked_to_be_compressed(server: Server, algorithm: str) -> None:
    values = np.zeros((2000, 4), np.float32)
    with triton.InferenceServerClient("{}:{}".format(*server.address())) as client:
        for binary in (True, False):
            given = triton.InferInput("input0", [2000, 4], "FP32")
            given.set_data_from_numpy(values, binary_data=binary)
            answer = client.infer(
                "linear", [given], outputs=[triton.InferRequestedOutput("output0", binary_data=binary)],
                request_compression_algorithm=algorithm, response_compression_algorithm=algorithm,
            )  # fmt: skip
            found = answer.as_numpy("output0")
            assert found.shape == (2000, 3) and (found == found[0]).all()


# --- one at a time ----------------------------------------------------------------------------------------------------


def test_ends_of_lines_and_leading_blanks_are_kept() -> None:
    assert event(" a\n") == b"data:  a\ndata: \n\n"
    assert event("a\u2028b\x0b", id="1", kind="k") == "id: 1\nevent: k\ndata: a\u2028b\x0b\n\n".encode()


def test_a_silent_stream_is_kept_alive_until_it_ends() -> None:
    loop, sent = FakeLoop(), list[bytes]()

    def deliver(exchange: Exchange) -> None:
        sent.extend(bytes(part) for part in exchange.parts)
        exchange.parts.clear()

    outer = Exchange(Request("GET", "/", headers=[("Accept", "text/event-stream")], id="r"), deliver)
    stream = EventStream(outer, loop.call_later).exchange
    loop.advance(100)
    assert sent == []  # nothing is sent before the answer begins: it may become an error
    stream.start_stream(Response(200, b"a"))
    loop.advance(event_streams.KEEP_ALIVE_S * 2.5)
    assert sent.count(b": keep-alive\n\n") == 1 and sent[0] == b"id: r/1\ndata: a\n\n"
    stream.write(b"b")
    stream.end_stream()
    loop.advance(1000)
    assert sent.count(b": keep-alive\n\n") == 1 and loop.timer_count == 0
    assert sent[-1] == b'event: end\ndata: {"parts": 2}\n\n' and outer.is_ended


def test_a_client_that_has_gone_has_no_timer() -> None:
    loop = FakeLoop()
    outer = Exchange(Request("GET", "/", id="r"), lambda exchange: None)
    stream = EventStream(outer, loop.call_later).exchange
    gone: list[bool] = []
    stream.on_disconnect = lambda: gone.append(True)
    stream.start_stream(Response(200, b"a"))
    outer.disconnect()
    assert gone == [True] and loop.timer_count == 0


@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_that_cannot_be_put_into_other_words_is_an_error(streams: bool) -> None:
    class Failing(Relay):
        def whole(self, response: Response) -> None:
            raise RecursionError

        def begin(self, head: Response) -> None:
            self.outer.start_stream(head)

        part = whole  # type: ignore[assignment]

    outer = Exchange(Request("POST", "/", id="r"), lambda exchange: None)
    relay, gone = Failing(outer), list[bool]()
    relay.exchange.on_disconnect = lambda: gone.append(True)
    if streams:
        relay.exchange.start_stream(Response(200, b"a"))
        assert gone == [True] and outer.is_aborted and outer.failure is not None and outer.failure.status == 500
    else:
        relay.exchange.respond(Response(200, b"a"))
        assert outer.response is not None and outer.response.status == 500


def test_who_does_not_ask_for_events_gets_the_exchange_itself() -> None:
    class Model:
        def predict(self, exchange: Exchange, *_: Any, **__: Any) -> None:
            self.got = exchange

    model: Any = Model()
    exchange = Exchange(Request("GET", "/", headers=[("Accept", "*/*")]), lambda exchange: None)
    predict(model, exchange)
    assert model.got is exchange
