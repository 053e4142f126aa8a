"""Over HTTP and gRPC, in both lanes: what a request holds is asked as it stands, or refused. Nothing gets lost."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch

from tests.support import serving_models
from tests.support.grpc_calls import refused as grpc_refused
from tests.support.grpc_calls import stub
from tests.support.handler_archives import write_handler
from tests.support.serving import Answer, Server

pytestmark = pytest.mark.server

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=BB"}
BYTES = struct.pack("<2f", 1, 2)

OWN = """
def handle(data, context):
    if data is not None:
        return [{key: value if isinstance(value, (dict, list)) else bytes(value).decode() for key, value in row.items()}
                for row in data]
"""


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("lossless"))
    config = {"input": {"dtype": "float32", "shape": [2]}}
    serving_models.write_torchscript(server.store, Doubled(), "doubled", config=config)
    write_handler(server.store, "own", OWN)
    with server:
        server.start("--grpc", "true", "--models", "doubled.mar", "own.mar")
        yield server


@pytest.fixture(params=["doubled", "own"])
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def part(name: str, content: bytes, head: str = "") -> bytes:
    return f'--BB\r\nContent-Disposition: form-data; name="{name}"\r\n{head}\r\n'.encode() + content + b"\r\n"


def refused(answer: Answer, text: str) -> None:
    assert answer.status == 400, answer.body
    assert answer.json["type"] == "BadRequestException"
    assert text in answer.json["message"]


@pytest.mark.parametrize(("body", "headers", "text"), [
    (part("data", BYTES) + part("data", BYTES[::-1]) + b"--BB--\r\n", MULTIPART, "more than one field 'data'"),
    (b"data=1&data=2", FORM, "more than one field 'data'"),
    (b'{"data": 1, "data": 2}', JSON, "'data' more than once"),
])  # fmt: skip
def test_what_is_given_twice_is_refused(
    server: Server, model: str, body: bytes, headers: dict[str, str], text: str
) -> None:
    refused(server.ask("POST", f"/predictions/{model}", body, headers), text)


def test_a_parameter_does_not_take_the_place_of_the_body(server: Server, model: str) -> None:
    refused(server.ask("POST", f"/models/{model}/invoke?body=3", b"[1, 2]", JSON), "more than one field 'body'")


def test_fields_of_different_names_all_reach_a_handler(server: Server) -> None:
    parts = part("data", b"1"), part("Data", b"2"), part("json", b"[3]", "Content-Type: application/json\r\n")
    body = b"".join(parts) + b"--BB--"
    assert server.ask("POST", "/predictions/own", body, MULTIPART).json == {"data": "1", "Data": "2", "json": "[3]"}
    answer = server.ask("POST", "/invocations?model_name=own&a=1;b=2", b"[4]", JSON)
    assert answer.json == {"body": [4], "model_name": "own", "a": "1", "b": "2"}


def test_the_parameter_that_names_the_model_is_no_input_of_a_built_in_handler(server: Server) -> None:
    assert server.ask("POST", "/invocations?model_name=doubled", b"[1, 2]", JSON).json == [2, 4]
    refused(server.ask("POST", "/invocations?model_name=doubled&scale=3", b"[1, 2]", JSON), "'scale'")


def test_json_in_a_part_is_read_also_where_its_type_has_parameters(server: Server) -> None:
    body = part("data", b"[1.0,20]", "Content-Type: application/json; charset=utf-8\r\n") + b"--BB--"
    assert server.ask("POST", "/predictions/doubled", body, MULTIPART).json == [2, 40]


@pytest.mark.parametrize(("body", "headers"), [
    (b"data=[1.0,20]", FORM), (part("data", b"[1.0,20]") + b"--BB--", MULTIPART),
])  # fmt: skip
def test_json_in_a_field_of_a_form_is_read(server: Server, body: bytes, headers: dict[str, str]) -> None:
    assert server.ask("POST", "/predictions/doubled", body, headers).json == [2, 40]


def test_what_was_sent_as_json_and_is_none_is_not_taken_for_numbers(server: Server) -> None:
    refused(server.ask("POST", "/predictions/doubled", b"[1.0,2.0", JSON), "the body says application/json but is not")


@pytest.mark.parametrize(("body", "headers"), [
    (b"[1.0,20]", {}), (b"\xff" * 8, {"Content-Type": "text/plain"}),
    (b"[1.0,20]", {"Content-Type": "application/vnd.a+json"}),
    (part("data", b"[1.0,20]", "Content-Type: application/jsonlines\r\n") + b"--BB--", MULTIPART),
    ("\ufeff[1,2]".encode(), {}), ("[12]".encode("utf-16-le"), {}), ("[12]".encode("utf-16-be"), {}),
    ("[1]".encode("utf-16"), {}), ("12.".encode("utf-16"), {}), ('{"ä":1}'.encode(), {}), (b"\x89PNG\r\n\x1a\n", {}),
    (b"\x89PNG\r\n\x1a\n", {"Content-Type": "image/png"}), (b"GIF89a\x01\0", {"Content-Type": "image/gif"}),
    (part("data", b"\x89PNG\r\n\x1a\n") + b"--BB--", MULTIPART),
])  # fmt: skip
def test_text_is_never_taken_for_numbers_in_memory(server: Server, body: bytes, headers: dict[str, str]) -> None:
    refused(server.ask("POST", "/predictions/doubled", body, headers), "application/octet-stream")


@pytest.mark.parametrize(("body", "headers", "numbers"), [
    (b"[1.0,20]", {"Content-Type": "application/octet-stream"}, struct.unpack("<2f", b"[1.0,20]")),
    (BYTES, {}, (1, 2)),
    (part("data", BYTES) + b"--BB--", MULTIPART, (1, 2)),
])  # fmt: skip
def test_numbers_in_memory_are_taken_as_they_are(
    server: Server, body: bytes, headers: dict[str, str], numbers: tuple[float, ...]
) -> None:
    answer = server.ask("POST", "/predictions/doubled", body, {"Accept": "application/octet-stream", **headers})
    assert struct.unpack("<2f", answer.body) == tuple(2 * number for number in numbers)


def test_a_grpc_input_that_nothing_reads_is_refused(server: Server) -> None:
    with stub(server) as client:
        answer = client.Predictions(model_name="doubled", input={"data": BYTES})
        assert struct.unpack("<2f", answer.prediction) == (2, 4)
        error = grpc_refused(client.Predictions, model_name="doubled", input={"data": BYTES, "scale": b"3"})
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and "'scale' that nothing reads" in error.details()
        everything: Any = json.loads(client.Predictions(model_name="own", input={"a": b"1", "b": b"2"}).prediction)
        assert everything == {"a": "1", "b": "2"}
