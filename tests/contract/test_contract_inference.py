"""Paths, methods and what of a request reaches the handler: a row for each row of the contract, sections 1.1 to 1.4,
against one real server and against an engine as an ASGI application. Requests are bytes, so that nothing between a row
and the server mends them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.asgi_site import needs_sockets, new_site
from tests.support.handler_archives import write_handler
from tests.support.raw_http import exchange, request
from tests.support.serving import JSON, Server
from tests.support.serving_models import write_linear

pytestmark = pytest.mark.server

# Answers with all that it was given: values with their type, headers as their names were spelled.
SHOW = """
NAMES = ("explain", "url_path", "describe", "X-Own", "x-own", "Authorization", "body", "text", "ts_request_sequence_id",
         "ts_request_sequence_start")


def told(value):
    return [type(value).__name__, value.decode("latin-1") if isinstance(value, (bytes, bytearray)) else value]


def handle(data, context):
    if data is None:
        return None
    return [
        {
            "row": {key: told(value) for key, value in row.items()},
            "headers": {name: context.get_request_header(index, name) for name in NAMES
                        if context.get_request_header(index, name) is not None},
        }
        for index, row in enumerate(data)
    ]
"""


@pytest.fixture(scope="module", params=["sockets", "asgi"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server: Server = new_site(request.param, tmp_path_factory.mktemp("inference"), {"enable_metrics_api": False})
    write_handler(server.store, "show", SHOW)
    sequences = {"sequenceBatching": True, "sequenceMaxIdleMSec": 60_000, "batchSize": 2, "maxNumSequence": 4}
    write_handler(server.store, "sequenced", SHOW, config=sequences)
    write_linear(server.store, "linear")
    with server:
        server.start("--models", "all")
        yield server


# --- 1.1: how a path and a query are read -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/predictions/show", 200),
        ("/predictions/show/", 200),
        ("/predictions/show///", 200),
        ("/predictions/s%68ow", 200),
        ("/pr%65dictions/show", 200),
        ("/predictions/show/1%2E0", 200),
        ("//predictions/show", 404),
        ("/predictions//show", 404),
        ("/Predictions/show", 404),
        ("/ping/", 200),
        ("//ping", 404),
        ("/predictions/show?", 200),
        ("http://localhost/predictions/show", 200),
    ],
)
def test_1_1_paths_are_decoded_and_lose_empty_ends_only(server: Server, target: str, status: int) -> None:
    assert exchange(server, request("POST", target, b"x")).status == status


@pytest.mark.parametrize(
    ("query", "inputs"),
    [
        ("a=1&b=2", {"a": "1", "b": "2"}),
        ("a=1;b=2", {"a": "1", "b": "2"}),
        ("a=x+y&b=x%20y", {"a": "x y", "b": "x y"}),
        ("a=&b", {"a": "", "b": ""}),
        ("a=%26%3D", {"a": "&="}),
    ],
)
def test_1_1_queries_are_separated_by_both_signs(server: Server, query: str, inputs: dict[str, str]) -> None:
    row = exchange(server, request("POST", f"/models/show/invoke?{query}", b"x")).json["row"]
    assert row == {"body": ["bytearray", "x"], **{key: ["bytearray", value] for key, value in inputs.items()}}


def test_1_1_of_a_repeated_management_parameter_the_first_counts(server: Server) -> None:
    answer = server.ask("GET", "/models?limit=1&limit=3", port="management")
    assert len(answer.json["models"]) == 1


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", ["/predictions/show", "/explanations/show", "/models/show/invoke", "/show/predict"])
def test_1_1_inference_does_not_look_at_the_method(server: Server, method: str, path: str) -> None:
    answer = exchange(server, request(method, path))
    assert (answer.status, answer.json["row"]) == (200, {"body": ["bytearray", ""]})


@pytest.mark.parametrize(
    ("version", "line", "status", "is_closed"),
    [
        ("1.1", "X-Own: 1", 200, False),
        ("1.1", "X-Own: 1", 404, False),  # errors of the application close nothing
        ("1.1", "Connection: close", 200, True),
        ("1.1", "Connection: close", 404, True),
        ("1.0", "Connection: keep-alive", 200, False),
        ("1.0", "X-Own: 1", 200, True),
    ],
)
def test_1_1_connections_are_kept(server: Server, version: str, line: str, status: int, is_closed: bool) -> None:
    needs_sockets(server)
    path = "/predictions/show" if status == 200 else "/predictions/none"
    answer = exchange(server, request("POST", path, b"x", line, version=version))
    assert (answer.status, answer.is_closed) == (status, is_closed)


def test_1_1_pipelined_requests_are_answered_in_order(server: Server) -> None:
    needs_sockets(server)
    with server.connect() as connection:
        connection.sendall(b"".join(request("POST", "/predictions/show", b"%d" % n) for n in range(5)))
        bodies = []
        stream = connection.makefile("rb")
        for _ in range(5):
            head = b"".join(iter(stream.readline, b"\r\n"))
            length = re.search(rb"(?i)content-length: (\d+)", head)
            assert length is not None
            bodies.append(json.loads(stream.read(int(length[1])))["row"]["body"][1])
    assert bodies == ["0", "1", "2", "3", "4"]


# --- 1.2: what is at which path ---------------------------------------------------------------------------------------

RESOURCE = (404, "ResourceNotFoundException", "Requested resource is not found, please refer to API document.")
NOT_ALLOWED = (405, "MethodNotAllowedException", "Requested method is not allowed, please refer to API document.")
PATHS = {
    "/", "/ping", "/v1/models/{model_name}:predict", "/v2/models/{model_name}/infer", "/predictions/{model_name}",
    "/predictions/{model_name}/{model_version}", "/api-description",
}  # fmt: skip


@pytest.mark.parametrize(("method", "target"), [("OPTIONS", "/"), ("GET", "/api-description"),
                                                ("POST", "/api-description")])  # fmt: skip
def test_1_2_the_connector_describes_itself(server: Server, method: str, target: str) -> None:
    described = exchange(server, request(method, target)).json
    assert re.fullmatch(r"3\.\d\.\d", described["openapi"])
    assert described["info"]["title"] == "TorchServe APIs" and described["info"]["version"]
    assert described["paths"].keys() >= PATHS


@pytest.mark.parametrize(
    ("method", "target", "error"),
    [
        ("POST", "/", NOT_ALLOWED),
        ("POST", "/predictions", RESOURCE),
        ("POST", "/explanations", RESOURCE),
        ("GET", "/nowhere", RESOURCE),
        ("GET", "/models", RESOURCE),  # of another port
        ("GET", "/metrics/no", RESOURCE),
        ("POST", "/invocations", (400, "BadRequestException", "Parameter model_name is required.")),
        ("POST", "/invocations?model_name=", (404, "ModelNotFoundException", "Model not found: ")),
        ("POST", "/predictions/none", (404, "ModelNotFoundException", "Model not found: none")),
        ("POST", "/v1/models/none:predict", (404, "ModelNotFoundException", "Model not found: none")),
        ("POST", "/predictions/show/9", (404, "ModelVersionNotFoundException",
                                         "Model version: 9 does not exist for model: show")),
        ("POST", "/v2/models/show/versions/9/infer", None),
    ],
)  # fmt: skip
def test_1_2_what_is_not_there_says_so(
    server: Server, method: str, target: str, error: tuple[int, str, str] | None
) -> None:
    answer = exchange(server, request(method, target))
    if error is None:  # the Open Inference Protocol, whose errors have a text alone beside TorchServe's
        assert answer.status == 404 and "9" in answer.json["error"]
    else:
        assert (answer.json["code"], answer.json["type"], answer.json["message"]) == error
        assert answer.status == error[0]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
def test_1_2_ping(server: Server, method: str) -> None:
    answer = exchange(server, request(method, "/ping"))
    assert (answer.status, answer.body) == (200, b'{\n  "status": "Healthy"\n}\n')


@pytest.mark.parametrize(
    ("target", "explain", "url_path"),
    [
        ("/predictions/show", "False", ""),
        ("/predictions/show/1.0", "False", ""),
        ("/predictions/show/1.0/v1/chat/completions", "False", "v1/chat/completions"),
        ("/predictions/show/1.0/%E6%97%A5/%C3%BC", "False", "\u65e5/\u00fc"),
        ("/explanations/show", "True", ""),
        ("/explanations/show/1.0", "True", ""),
        ("/models/show/invoke", None, None),
        ("/invocations?model_name=show", None, None),
        ("/show/predict", None, None),
        ("/show/1.0/predict", None, None),
        ("/v1/models/show:predict", "False", None),
        ("/v1/models/show:explain", "True", None),
        ("/v2/models/show/infer", "False", None),
        ("/v2/models/show/explain", "True", None),
    ],
)
def test_1_2_each_form_of_a_prediction(server: Server, target: str, explain: str | None, url_path: str | None) -> None:
    answer = exchange(server, request("POST", target, b"x"))
    assert answer.status == 200, answer.body
    headers = answer.json["headers"]
    assert (headers.get("explain"), headers.get("url_path")) == (explain, url_path)


@pytest.mark.parametrize("target", ["/predictions/show", "/predictions/show/1.0", "/explanations/show"])
def test_1_2_a_model_describes_itself(server: Server, target: str) -> None:
    described = exchange(server, request("OPTIONS", target)).json
    assert described["info"] == {"title": "RESTful API for: show", "version": "1.0.0"}
    assert described["paths"].keys() >= {"/predictions/show", "/v1/models/show:predict", "/v2/models/show/infer"}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/v2", {"extenstion": ["kserve", "kubeflow"]}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
    ],
)
def test_1_2_the_open_inference_protocol_without_its_switch(
    server: Server, target: str, expected: dict[str, Any]
) -> None:
    answer = exchange(server, request("GET", target))
    assert answer.status == 200 and answer.json.items() >= expected.items()


# --- 1.3: what the handler is given -----------------------------------------------------------------------------------

BOUNDARY = "Content-Type: multipart/form-data; boundary=b"
FORM = "Content-Type: application/x-www-form-urlencoded"


def parts(*each: tuple[str, str]) -> bytes:
    """A form of (lines of the part's head, value)."""
    text = "".join(f"--b\r\nContent-Disposition: form-data; {head}\r\n\r\n{value}\r\n" for head, value in each)
    return f"{text}--b--\r\n".encode()


@pytest.mark.parametrize(
    ("line", "body", "row"),
    [
        ("X-Own: no type", b"", {"body": ["bytearray", ""]}),
        ("X-Own: no type", b"a", {"body": ["bytearray", "a"]}),
        ("Content-Type: application/octet-stream", b"\x00\xff", {"body": ["bytearray", "\x00\xff"]}),
        ("Content-Type: image/png", b"a", {"body": ["bytearray", "a"]}),
        ("Content-Type: application/json", b'{"a": [1, null]}', {"body": ["dict", {"a": [1, None]}]}),
        ("Content-Type: application/json", b"[1]", {"body": ["list", [1]]}),
        ("Content-Type: application/json", b"3", {"body": ["int", 3]}),
        ("Content-Type: application/json", b'"t"', {"body": ["str", "t"]}),
        ("Content-Type: application/json", b"null", {"body": ["NoneType", None]}),
        ("Content-Type: application/json; charset=utf-8", b"[1]", {"body": ["list", [1]]}),
        ("Content-Type: application/json", b"{not json", {"body": ["bytearray", "{not json"]}),
        ("Content-Type: application/json+x", b"[1]", {"body": ["bytearray", "[1]"]}),
        ("Content-Type: text/plain", "é".encode(), {"body": ["str", "é"]}),
        ("Content-Type: text/csv; charset=utf-8", b"1,2", {"body": ["str", "1,2"]}),
        ("Content-Type: text/plain", b"\xff", {"body": ["bytearray", "\xff"]}),
        (FORM, b"a=1&b=x+y&data=%41", {"a": ["bytearray", "1"], "b": ["bytearray", "x y"], "data": ["bytearray", "A"]}),
        (BOUNDARY, parts(('name="data"; filename="f"', "a")), {"data": ["bytearray", "a"]}),
        (BOUNDARY, parts(('name="a"', "1"), ('name="f"; filename="f"', "2")),
         {"a": ["bytearray", "1"], "f": ["bytearray", "2"]}),
        (BOUNDARY, parts(('name="a"; filename="f"\r\nContent-Type: application/json', "[1]")), {"a": ["list", [1]]}),
        (BOUNDARY, parts(('name="a"; filename="f"\r\nContent-Type: application/json; charset=utf-8', "[1]")),
         {"a": ["list", [1]]}),
        (BOUNDARY, parts(('name="a"; filename="f"\r\nContent-Type: text/plain', "t")), {"a": ["str", "t"]}),
    ],
)  # fmt: skip
def test_1_3_a_row_as_the_handler_has_it(server: Server, line: str, body: bytes, row: dict[str, Any]) -> None:
    answer = exchange(server, request("POST", "/predictions/show", body, line))
    assert answer.status == 200, answer.body
    assert answer.json["row"] == row


@pytest.mark.parametrize(
    ("target", "line", "body"),
    [
        ("/predictions/show", BOUNDARY, parts(('name="a"', "1"), ('name="a"', "2"))),
        ("/predictions/show", FORM, b"a=1&b=2&a=3"),
        ("/predictions/show", "Content-Type: application/json", b'{"a": 1, "a": 2}'),
        ("/models/show/invoke?a=1&a=2", "Content-Type: text/plain", b"x"),
        ("/models/show/invoke?a=1", FORM, b"a=2"),
    ],
)
def test_1_3_of_what_is_given_twice_nothing_is_dropped(server: Server, target: str, line: str, body: bytes) -> None:
    answer = exchange(server, request("POST", target, body, line))
    assert (answer.status, answer.json["type"]) == (400, "BadRequestException")
    assert "'a'" in answer.json["message"] and "more than o" in answer.json["message"]


@pytest.mark.parametrize(
    ("target", "is_input"),
    [
        ("/models/show/invoke?q=1", True),
        ("/invocations?model_name=show&q=1", True),
        ("/show/predict?q=1", True),
        ("/show/1.0/predict?q=1", True),
        ("/predictions/show?q=1", False),
        ("/explanations/show?q=1", False),
        ("/v1/models/show:predict?q=1", False),
        ("/v2/models/show/infer?q=1", False),
    ],
)
@pytest.mark.parametrize("form", [False, True])
def test_1_3_where_a_query_is_an_input(server: Server, target: str, is_input: bool, form: bool) -> None:
    answer = exchange(server, request("POST", target, b"f=2", FORM if form else "X-Own: 1"))
    row = answer.json["row"]
    assert row.pop("f" if form else "body") == (["bytearray", "2"] if form else ["bytearray", "f=2"])
    row.pop("model_name", None)
    assert row == ({"q": ["bytearray", "1"]} if is_input else {})


@pytest.mark.parametrize(
    ("lines", "name", "value"),
    [
        (["X-Own: Mine"], "X-Own", "Mine"),
        (["X-Own: Mine"], "x-own", "Mine"),  # as the client spelled them, and otherwise in any case
        (["X-Own: 1", "x-own: 2"], "X-Own", "1"),
        (["X-Own: 1", "x-own: 2"], "x-own", "2"),
        (["X-Own: 1", "X-Own: 2"], "X-Own", "2"),
        (["Authorization: Bearer abc"], "Authorization", "Bearer abc"),
        (["Content-Type: text/plain"], "body", {"content-type": "text/plain"}),
        (["explain: True"], "explain", "False"),  # the server's own goes before
        (["ts_request_sequence_id: s-1"], "ts_request_sequence_id", "s-1"),
    ],
)
def test_1_3_headers_as_the_handler_has_them(server: Server, lines: list[str], name: str, value: Any) -> None:
    if lines[0] == "X-Own: 1" and value == "1":
        needs_sockets(server)  # ASGI has all names in lower case: two spellings are one
    headers = exchange(server, request("POST", "/predictions/show", b"x", *lines)).json["headers"]
    assert headers.get(name) == value


def test_1_3_a_form_has_a_type_for_each_field(server: Server) -> None:
    body = parts(('name="text"; filename="f"\r\nContent-Type: text/plain', "t"))
    headers = exchange(server, request("POST", "/predictions/show", body, BOUNDARY)).json["headers"]
    assert headers["text"] == {"content-type": "text/plain"}


def test_1_3_values_are_left_alone_where_the_configuration_says_so(tmp_path: Path) -> None:
    server = Server(tmp_path)
    write_handler(server.store, "show", SHOW)
    server.environment |= {"PYSERVE_DECODE_INPUT_REQUEST": "false"}
    with server:
        server.start("--models", "show.mar")
        for kind in ("application/json", "text/plain"):
            answer = server.ask("POST", "/predictions/show", b"[1]", {"Content-Type": kind})
            assert answer.json["row"] == {"body": ["bytearray", "[1]"]}


# --- 1.4: sequences ---------------------------------------------------------------------------------------------------


def test_1_4_a_sequence_without_an_id_is_given_one(server: Server) -> None:
    first, second = (server.ask("POST", "/predictions/sequenced", b"[1]", JSON) for _ in range(2))
    assert first.json["headers"]["ts_request_sequence_start"] == "true"
    ids = {answer.json["headers"]["ts_request_sequence_id"] for answer in (first, second)}
    assert len(ids) == 2 and all(re.fullmatch(r"ts-seq-[0-9a-f-]{36}", id) for id in ids)
    assert not any(name.startswith("ts_request_sequence") for name in first.headers)  # told by handlers alone
