"""A real server and input that is wrong in every way: a clear answer, and the others are served as before."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor, nn

from tests.support.serving import JSON, LIMIT_S, RAW, Answer, Server, at_once, random_bytes
from tests.support.serving_models import write_eager, write_torchscript

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = pytest.mark.server

REQUEST_SIZE_MAX = 6_553_500


@pytest.fixture(autouse=True)
def canary(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the same process answers, on another connection and for another model."""
    server: Server = request.getfixturevalue("site")
    pid = server.process.pid
    yield
    assert server.predict("linear", [0, 0, 0, 0]).status == 200
    assert server.ask("GET", "/ready").status == 200
    assert server.process.pid == pid
    server.wait_for(lambda: server.metric("pyserve_requests_in_flight") == 0, "nothing to be in flight")


def exchange(server: Server, sent: bytes, port: str = "inference") -> list[Answer]:
    """All answers to ``sent``, after which the client sends no more."""
    with server.connect(port) as client:
        try:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # closed early; what it said before is still to be read
        received = b""
        while chunk := client.recv(65536):
            received += chunk
    answers = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
        size = int(headers["content-length"])
        answers.append(Answer(int(lines[0].split()[1]), headers, received[:size]))
        received = received[size:]
    return answers


def assert_error(answer: Answer, status: int, kind: str) -> str:
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert (answer.json["code"], answer.json["type"]) == (status, kind)
    text = answer.body.decode()
    assert "Traceback" not in text
    message: str = answer.json["message"]
    return message


@pytest.fixture(scope="module", autouse=True)
def slow_client(site: Server) -> Iterator[socket.socket]:
    """Has begun a request when the tests of this file begin, and never goes on."""
    with site.connect() as client:
        client.sendall(b"POST /predictions/linear HTTP/1.1\r\nhost: x\r\nx-slow: ")
        yield client


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_an_unknown_model_or_version_is_named(site: Server) -> None:
    message = assert_error(site.predict("nope", []), 404, "ModelNotFoundException")
    assert message == "Model not found: nope"
    message = assert_error(site.predict("linear/7.0", []), 404, "ModelVersionNotFoundException")
    assert message == "Model version: 7.0 does not exist for model: linear"
    for method in ("GET", "PUT", "DELETE"):
        answer = site.ask(method, "/models/nope", port="management")
        assert assert_error(answer, 404, "ModelNotFoundException") == "Model not found: nope"


def test_a_wrong_method_or_path_is_refused(site: Server) -> None:
    answer = site.ask("DELETE", "/models", port="management")
    assert_error(answer, 405, "MethodNotAllowedException")
    assert answer.headers["allow"] == "GET, HEAD, POST"
    assert_error(site.ask("GET", "/nothing/here"), 404, "ResourceNotFoundException")
    assert_error(site.ask("GET", "/predictions"), 404, "ResourceNotFoundException")
    assert_error(site.ask("POST", "/ready"), 405, "MethodNotAllowedException")


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("batchsize=8", "batch_size"),
        ("batch_size=0", "batch_size"),
        ("batch_size=dd", "batch_size"),
        ("max_batch_delay=-1", "max_batch_delay"),
        ("min_worker=nan", "min_worker"),
        ("min_worker=2&max_worker=1", "max_worker"),
        ("min_worker=100000", "min_worker"),
        ("min_batch=9", "min_batch"),
        ("synchronous=maybe", "synchronous"),
        ("job_queue_size=999999", "job_queue_size"),
        ("model_version=9.9&min_worker=1", "9.9"),
    ],
)
def test_a_wrong_parameter_is_named_and_changes_nothing(site: Server, query: str, name: str) -> None:
    before = site.describe("linear")
    answer = site.ask("PUT", f"/models/linear?response_timeout=7&{query}", port="management")
    assert answer.status in (400, 404)
    assert name in answer.json["message"]
    after = site.describe("linear")
    for key in ("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "minBatch"):
        assert after[key] == before[key]
    assert len(after["workers"]) == len(before["workers"])


@pytest.mark.parametrize(
    "query",
    ["", "url=", "url=../linear.mar", "url=https://example.com/m.mar", "url=%2Fetc%2Fpasswd", "url=linear.mar%00",
     "url=linear.mar&batch_size=0", "url=linear.mar&model_name=a%2Fb", "url=linear.mar&model_name=.."],
)  # fmt: skip
def test_a_registration_that_cannot_be_is_refused(site: Server, query: str) -> None:
    before = site.manage("GET", "/models")
    answer = site.ask("POST", f"/models?{query}", port="management")
    assert answer.status in (400, 404), answer.body
    assert answer.json["message"]
    assert site.manage("GET", "/models") == before


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "headers", "text"),
    [
        (b"", {}, "empty body"),
        (b"[1, 2, 3]", JSON, "expected float32 [4]"),
        (b"[1, 2, 3, 4, 5]", JSON, "expected float32 [4]"),
        (b'["a", 2, 3, 4]', JSON, "expected float32 [4]"),
        (b'{"x": 1}', JSON, "expected float32 [4]"),
        (b"[1, 2, 3", JSON, "the body says application/json but is not"),
        (b"null", JSON, "null"),
        (b"123", RAW, "expected 16 bytes of little-endian float32 [4], got 3 bytes"),
        (b"[" * 200_000 + b"]" * 200_000, JSON, "nested more than 100 levels deep"),
        (b"[" * 99 + b"]" * 99, JSON, "expected float32 [4]"),
        (b"[1, 2, 3, " + b"9" * 5000 + b"]", JSON, ""),
        (b"a=1&b=2", {"Content-Type": "application/x-www-form-urlencoded"}, "no input"),
        (b"--x\r\n\r\nno end", {"Content-Type": "multipart/form-data; boundary=x"}, ""),
        (b"x", {"Content-Type": "multipart/form-data"}, "expected"),
        (b"--y\r\n", {"Content-Type": "multipart/form-data; boundary=x"}, "no line '--x'"),
    ],
)
def test_a_body_that_is_no_tensor_is_a_400_that_says_what_was_expected(
    site: Server, body: bytes, headers: dict[str, str], text: str
) -> None:
    answer = site.ask("POST", "/predictions/linear", body, headers)
    message = assert_error(answer, 400, "BadRequestException")
    assert text in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "body",
    [b"", b"hello", b"\xff\xd8\xff\xe0 no picture", b"\x89PNG\r\n\x1a\n", b"<svg></svg>", random_bytes(4096)],
    ids=["empty", "text", "jpeg head", "png head", "svg", "random"],
)
def test_what_is_no_picture_is_a_400_that_says_so(site: Server, body: bytes) -> None:
    answer = site.ask("POST", "/predictions/pictures", body)
    assert "picture" in assert_error(answer, 400, "BadRequestException")


def test_many_wrong_requests_at_once_harm_no_right_one(site: Server) -> None:
    bodies = [b"[1, 2, 3, 4]", b"[1]", b"nonsense", b"[1, 2, 3, 4]", random_bytes(100_000)] * 4
    answers = at_once([
        lambda body=body: site.ask("POST", "/predictions/linear", body, JSON)  # type: ignore[misc]
        for body in bodies
    ])  # fmt: skip
    assert [answer.status for answer in answers] == [200, 400, 400, 200, 400] * 4


def test_a_body_over_the_limit_is_a_413_that_can_be_read(site: Server) -> None:
    answer = site.ask("POST", "/predictions/linear", bytes(REQUEST_SIZE_MAX), RAW)
    assert_error(answer, 400, "BadRequestException")  # exactly at the limit: read, and no tensor
    head = b"POST /predictions/linear HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (REQUEST_SIZE_MAX + 1)
    # Sends all of it before it reads, as simple clients do.
    (answer,) = exchange(site, head + bytes(REQUEST_SIZE_MAX + 1))
    message = assert_error(answer, 413, "BadRequestException")
    assert f"max_request_size is {REQUEST_SIZE_MAX} bytes" in message
    assert answer.headers["connection"] == "close"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_curl_shows_the_413(site: Server, tmp_path: Path, framing: str) -> None:
    (tmp_path / "big").write_bytes(bytes(3 * REQUEST_SIZE_MAX))
    options = ["-H", "Transfer-Encoding: chunked"] if framing == "chunked" else []
    done = subprocess.run(
        ["curl", "-sS", f"{site.url()}/predictions/linear", "-T", "big", *options],
        cwd=tmp_path, capture_output=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert json.loads(done.stdout)["code"] == 413, done.stderr


# --- broken connections -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /predictions/linear HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n[1, 2",
        b"POST /predictions/linear HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n64\r\n[1",
        b"POST /predictions/linear HTTP/1.1\r\nhos",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random_bytes(500),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        random_bytes(4096),
        b"GET /ping HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    ids=["half a body", "half a chunk", "half a head", "tls", "http2", "random", "two framings"],
)
@pytest.mark.parametrize("port", ["inference", "management"])
def test_what_is_no_request_is_answered_once_and_the_connection_closed(site: Server, sent: bytes, port: str) -> None:
    (answer,) = exchange(site, sent, port)
    assert answer.status in (400, 405, 501, 505)
    assert answer.headers["connection"] == "close"
    assert "Traceback" not in answer.body.decode()


def test_a_client_that_hangs_up_in_the_middle_harms_nobody(site: Server) -> None:
    request = b"POST /predictions/linear HTTP/1.1\r\nhost: x\r\ncontent-length: 12\r\n\r\n[1, 2, 3, 4]"
    for size in (0, 10, 60, len(request) - 1, len(request)):
        with site.connect() as client:
            client.sendall(request[:size])


def test_a_client_that_never_ends_its_head_is_told_and_closed(slow_client: socket.socket) -> None:
    received = b""
    while chunk := slow_client.recv(65536):
        received += chunk
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"Request head took longer than 10 s." in received


# --- what errors give away --------------------------------------------------------------------------------------------


class Secretive(nn.Module):
    """[n, 4] -> [n, 4]; raises for negative numbers, with a text nobody else should read."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x < 0).any()):
            raise ValueError("the secret sauce")
        return x


def test_errors_give_no_path_and_no_exception_away_when_others_can_ask(server: Server) -> None:
    config = {"input": {"dtype": "float32", "shape": [4]}}
    write_torchscript(server.store, Secretive(), "secretive", config=config)
    write_eager(server.store, "broken", "import no_such_module\n", {}, config=config)
    (server.store / "damaged.mar").write_bytes((server.store / "secretive.mar").read_bytes()[:-30])
    everywhere = [
        part for name in ("inference", "management") for part in (f"--{name}-address", "http://0.0.0.0:0")
    ]  # fmt: skip
    started = server.start("--enable-model-api", "--models", "secretive.mar", "broken.mar", "damaged.mar", *everywhere)
    assert "FAILED" in started.stdout
    asked = [
        server.predict("secretive", [-1, 0, 0, 0]),
        server.predict("secretive", [1]),
        server.predict("broken", [1]),
        server.predict("nope", [1]),
        server.ask("GET", "/ready"),
        server.ask("GET", "/ping"),
        server.ask("GET", "/nothing"),
        server.ask("POST", "/predictions/secretive", bytes(REQUEST_SIZE_MAX + 1)),
        *(
            server.ask(
                "POST", f"/models?url={url}&model_name=other&initial_workers=1", None, server.key(), port="management"
            )
            for url in ("damaged.mar", "absent.mar", "broken.mar", "../x", "%2Fetc%2Fpasswd")
        ),
        server.ask("PUT", "/models/secretive?batch_size=x", None, server.key(), port="management"),
        server.ask("PUT", "/models/broken?min_worker=2&synchronous=true", None, server.key(), port="management"),
        *exchange(server, random_bytes(200)),
    ]
    assert server.predict("secretive", [1, 0, 0, 0]).status == 200
    for answer in asked:
        text = answer.body.decode()
        assert answer.status >= 400 and answer.status != 401, text
        for private in (str(server.folder), str(Path(__file__).parents[2]), "Traceback", "the secret sauce"):
            assert private not in text
        assert not re.search(r"(?<![\w/])/(tmp|home|root|usr|work)/", text), text
    # Only whoever manages the models is told what is wrong with one.
    assert not any(b"no_such_module" in answer.body for answer in asked[:8])
    assert asked[0].status == 503
    assert asked[0].json["message"] == "Prediction failed"
    assert set(asked[0].detail) == {"request_id"}
    # Whoever runs the server finds it in the log, by the request's id.
    server.wait_for_log("the secret sauce")
    record = next(line for line in server.log().splitlines() if asked[0].detail["request_id"] in line)
    assert "ERROR" in record
