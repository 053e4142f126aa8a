"""Triton's own gRPC client, unchanged, against the Open Inference Protocol; and the protocol's lists, raw messages."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from pyserve.grpc_api.messages import OPEN_INFERENCE, OPEN_INFERENCE_TORCHSERVE
from tests.support import serving_models
from tests.support.grpc_calls import Stub, refused, stub
from tests.support.handler_archives import write_handler
from tests.support.serving import LIMIT_S, Server

pytestmark = pytest.mark.server

Code = grpc.StatusCode
DATATYPES = {
    "BOOL": torch.bool, "UINT8": torch.uint8, "INT8": torch.int8, "INT16": torch.int16, "INT32": torch.int32,
    "INT64": torch.int64, "FP16": torch.float16, "FP32": torch.float32, "FP64": torch.float64,
}  # fmt: skip
LISTS = {"BOOL": "bool", "UINT8": "uint", "INT8": "int", "INT16": "int", "INT32": "int", "INT64": "int64",
         "FP32": "fp32", "FP64": "fp64"}  # fmt: skip

# Knows the protocol's JSON itself.
OWN = """
import json


def handle(data, context):
    if data is None:
        return None
    answers = []
    for row in data:
        request = row["body"]
        tensor = request["inputs"][0]
        answers.append({"id": request.get("id"), "model_name": "own", "model_version": "1.0", "outputs": [
            {"name": "out", "shape": tensor["shape"], "datatype": tensor["datatype"], "data": tensor["data"]}]})
    return answers
"""

# Answers what it was asked, once the file that it names is there, and notes that it has begun.
WAITS = """
import base64
import os
import time


def handle(data, context):
    if data is None:
        return None
    (row,) = data
    value, until, notes = (base64.b64decode(text).decode() for text in row["body"]["inputs"][0]["data"])
    open(notes, "a").write(value)
    while not os.path.exists(until):
        time.sleep(0.001)
    return [{"outputs": [{"name": "out", "shape": [1], "datatype": "BYTES", "data": [value]}]}]
"""

# Keeps the first number of each request of a sequence.
ADDER = """
class Adder:
    def initialize(self, context):
        self.numbers = {}

    def handle(self, data, context):
        answers = []
        for index, row in enumerate(data):
            id = context.get_sequence_id(index)
            self.numbers.setdefault(id, []).append(row["body"]["inputs"][0]["data"][0])
            start = context.get_request_header(index, context.header_key_sequence_start)
            answers.append({"id": id, "numbers": list(self.numbers[id]), "start": start})
        return answers
"""


class Same(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("triton"))
    serving_models.write_linear(server.store)
    serving_models.write_linear(server.store, version="2.0", seed=2, file="linear-2")
    serving_models.write_pictures(server.store)
    for datatype, dtype in DATATYPES.items():
        config = {"input": {"dtype": str(dtype).removeprefix("torch."), "shape": [3]}}
        serving_models.write_torchscript(server.store, Same(), f"same-{datatype}", config=config)
    write_handler(server.store, "own", OWN)
    sequences = {"sequenceBatching": True, "batchSize": 4, "maxNumSequence": 10, "maxSequenceJobQueueSize": 10,
                 "minWorkers": 2, "maxWorkers": 2}  # fmt: skip
    write_handler(server.store, "adder", ADDER, config=sequences)
    write_handler(server.store, "waits", WAITS, config={"minWorkers": 3, "maxWorkers": 3})
    (server.folder / "config.properties").write_text("max_request_size=200000\n")
    with server:
        server.start("--grpc", "true", "--models", "all")
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.grpc()) as made:
        yield made


@pytest.fixture(params=[OPEN_INFERENCE, OPEN_INFERENCE_TORCHSERVE])
def plain(server: Server, request: pytest.FixtureRequest) -> Iterator[Stub]:
    """The service under each of its names."""
    with stub(server, f"{request.param}.GRPCInferenceService") as made:
        yield made


def tensor(value: np.ndarray[Any, Any], datatype: str, name: str = "input0") -> triton.InferInput:
    made = triton.InferInput(name, list(value.shape), datatype)
    made.set_data_from_numpy(value)
    return made


def test_health(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("linear") and client.is_model_ready("linear", "2.0")


def test_a_model_without_workers_is_not_ready(server: Server, client: triton.InferenceServerClient) -> None:
    server.manage("PUT", "/models/own?min_worker=0&synchronous=true")
    try:
        assert not client.is_model_ready("own")
    finally:
        server.manage("PUT", "/models/own?min_worker=1&synchronous=true")


def test_metadata(client: triton.InferenceServerClient) -> None:
    about = client.get_server_metadata(as_json=True)
    assert about["name"] and about["version"] and "binary_tensor_data" in about["extensions"]
    model = client.get_model_metadata("linear", as_json=True)
    assert sorted(model["versions"]) == ["1.0", "2.0"]
    assert model["inputs"] == [{"name": "input0", "datatype": "FP32", "shape": ["-1", "4"]}]
    assert model["outputs"] == [{"name": "output0", "datatype": "FP32", "shape": ["-1", "3"]}]


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_rows_are_answered_as_the_network_would(client: triton.InferenceServerClient, rows: int) -> None:
    x = torch.randn(rows, 4)
    answer = client.infer("linear", [tensor(x.numpy(), "FP32")], request_id="mine", model_version="2.0")
    with torch.inference_mode():
        expected = serving_models.Linear(2)(x)
    assert np.allclose(answer.as_numpy("output0"), expected.numpy(), rtol=1e-5, atol=1e-6)
    told = answer.get_response()
    assert (told.id, told.model_name, told.model_version) == ("mine", "linear", "2.0")


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype(client: triton.InferenceServerClient, datatype: str) -> None:
    value = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(DATATYPES[datatype]).numpy()
    answer = client.infer(f"same-{datatype}", [tensor(value, datatype)])
    got = answer.as_numpy("output0")
    assert got.dtype == value.dtype and (got == value).all()


@pytest.mark.parametrize("datatype", LISTS)
def test_every_datatype_in_lists(plain: Stub, datatype: str) -> None:
    values = [False, True, True] if datatype == "BOOL" else [0, 1, 2]
    field = f"{LISTS[datatype]}_contents"
    entry = {"name": "input0", "datatype": datatype, "shape": [1, 3], "contents": {field: values}}
    answer = plain.ModelInfer(model_name=f"same-{datatype}", id="x", inputs=[entry])
    assert list(getattr(answer.outputs[0].contents, field)) == values
    assert not answer.raw_output_contents and answer.id == "x"


def test_pictures_go_as_bytes(client: triton.InferenceServerClient) -> None:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(file, "PNG")
    value = np.array([[file.getvalue()]] * 2, dtype=np.object_)
    answer = client.infer("pictures", [tensor(value, "BYTES")])
    first, second = answer.as_numpy("output0").flatten()
    assert len(json.loads(first)) == 5 and first == second


def test_requested_outputs(client: triton.InferenceServerClient) -> None:
    x = np.zeros((1, 4), np.float32)
    answer = client.infer("linear", [tensor(x, "FP32")], outputs=[triton.InferRequestedOutput("output0")])
    assert answer.as_numpy("output0").shape == (1, 3)
    with pytest.raises(InferenceServerException, match="other"):
        client.infer("linear", [tensor(x, "FP32")], outputs=[triton.InferRequestedOutput("other")])


def test_an_own_handler_gets_the_protocols_json(client: triton.InferenceServerClient) -> None:
    answer = client.infer("own", [tensor(np.array([[1, 2]], np.int64), "INT64", "x")], request_id="7")
    assert answer.as_numpy("out").tolist() == [[1, 2]] and answer.get_response().id == "7"


def test_calls_without_waiting(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    for number in range(8):
        x = np.full((1, 4), number, np.float32)
        client.async_infer("linear", [tensor(x, "FP32")], lambda result, error: answers.put((result, error)))
    got = [answers.get(timeout=LIMIT_S) for _ in range(8)]
    assert all(error is None and result.as_numpy("output0").shape == (1, 3) for result, error in got)


def test_a_stream_is_answered_in_the_order_asked_and_each_answer_has_an_id(
    server: Server, client: triton.InferenceServerClient, tmp_path: Path
) -> None:
    notes, here, later = (tmp_path / name for name in ("notes", "here", "later"))
    here.touch()

    def ask(value: str, until: Path, **options: Any) -> None:
        texts = np.array([str(each).encode() for each in (value, until, notes)], np.object_)
        client.async_stream_infer("waits", [tensor(texts, "BYTES", "x")], **options)

    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    ask("a", later)
    ask("b", here)
    client.async_stream_infer("none", [tensor(np.zeros((1, 4), np.float32), "FP32")])
    ask("c", here, request_id="mine")
    ask("d", here)
    server.wait_for(lambda: notes.exists() and sorted(notes.read_text()) == list("abcd"), "all to have begun")
    later.touch()
    got = [answers.get(timeout=LIMIT_S) for _ in range(5)]
    client.stop_stream()
    told = [str(error) if error else (result.get_response().id, result.as_numpy("out")[0]) for result, error in got]
    assert told[:2] + told[3:] == [("0", b"a"), ("1", b"b"), ("mine", b"c"), ("4", b"d")]
    assert told[2].startswith("Model not found: none\n") and '"position": 2' in told[2]


def test_an_error_in_a_stream_has_the_id_of_its_request(plain: Stub) -> None:
    call, request = plain.method("ModelStreamInfer")
    told = list(call(iter([request(model_name="none", id="mine"), request()]), timeout=LIMIT_S))
    assert [answer.infer_response.id for answer in told] == ["mine", "1"]
    assert [answer.error_message.split("\n")[0] for answer in told] == [
        "Model not found: none", "Parameter model_name is required.",
    ]  # fmt: skip


def test_requests_of_a_sequence_keep_its_state_and_its_order(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for turn in range(3):
        for id, size in ((7, 20_000), (8, 1)):  # what is long to read does not fall behind
            x = tensor(np.full(size if turn == 0 else 1, turn, np.int64), "INT64", "x")
            client.async_stream_infer("adder", [x], sequence_id=id, sequence_start=turn == 0)
    got = [answers.get(timeout=LIMIT_S) for _ in range(6)]
    client.stop_stream()
    assert [str(error) for _, error in got] == ["None"] * 6
    told = [json.loads(result.as_numpy("output0")[0]) for result, _ in got]
    assert [each["id"] for each in told] == ["7", "8"] * 3
    assert [each["numbers"] for each in told] == [[0], [0], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2]]
    assert [each["start"] for each in told] == ["true", "true", None, None, None, None]


def test_statistics_and_index(client: triton.InferenceServerClient) -> None:
    def count() -> int:
        (told,) = client.get_inference_statistics("linear", "1.0").model_stats
        return int(told.inference_stats.success.count)

    before = count()
    client.infer("linear", [tensor(np.zeros((1, 4), np.float32), "FP32")], model_version="1.0")
    assert count() == before + 1
    rows = client.get_inference_statistics("linear").model_stats
    assert sorted(row.version for row in rows) == ["1", "1.0", "2", "2.0"]  # whole numbers are what perf_analyzer knows
    index = client.get_model_repository_index(as_json=True)["models"]
    assert {"name": "linear", "version": "2.0", "state": "READY"} in index and len(index) == 6 + len(DATATYPES)


RAW = {"model_name": "linear", "raw_input_contents": [b"\0" * 16]}
GOOD = {"name": "input0", "datatype": "FP32", "shape": [1, 4]}


@pytest.mark.parametrize(("fields", "code", "text"), [
    ({}, Code.INTERNAL, "Parameter model_name is required."),
    ({"model_name": "none"}, Code.NOT_FOUND, "Model not found: none"),
    ({"model_name": "linear", "model_version": "9"}, Code.NOT_FOUND, "Model version: 9"),
    ({"model_name": "linear"}, Code.INVALID_ARGUMENT, "no inputs"),
    ({**RAW, "inputs": [GOOD, GOOD]}, Code.INVALID_ARGUMENT, "one for each"),
    ({**RAW, "inputs": [{**GOOD, "shape": [1, 5]}]}, Code.INVALID_ARGUMENT, "needs 20 bytes, got 16"),
    ({**RAW, "inputs": [{**GOOD, "shape": [-1, 4]}]}, Code.INVALID_ARGUMENT, "negative"),
    ({**RAW, "inputs": [{**GOOD, "datatype": "FP33"}]}, Code.INVALID_ARGUMENT, "unknown datatype"),
    ({**RAW, "inputs": [{**GOOD, "datatype": "INT32"}]}, Code.INVALID_ARGUMENT, "must be FP32"),
    ({**RAW, "inputs": [{**GOOD, "contents": {"fp32_contents": [1]}}]}, Code.INVALID_ARGUMENT, "give one of them"),
    ({"model_name": "linear", "inputs": [{**GOOD, "contents": {"fp32_contents": [1]}}]}, Code.INVALID_ARGUMENT, "4"),
    ({"model_name": "linear", "inputs": [{**GOOD, "contents": {"fp32_contents": [1] * 4, "int_contents": [2] * 4}}]},
     Code.INVALID_ARGUMENT, "whose values are fp32_contents; it has int_contents"),
    ({**RAW, "inputs": [GOOD], "parameters": {"sequence_id": {"string_param": "\n"}}}, Code.INVALID_ARGUMENT,
     "printable"),
    ({"model_name": "same-FP16", "inputs": [{**GOOD, "datatype": "FP16", "shape": [1, 3]}]}, Code.INVALID_ARGUMENT,
     "raw_input_contents"),
    ({**RAW, "inputs": [{**GOOD, "parameters": {"shared_memory_region": {"string_param": "x"}}}]},
     Code.INVALID_ARGUMENT, "shared_memory_region"),
    ({**RAW, "inputs": [{**GOOD, "shape": [1] * 65}]}, Code.INVALID_ARGUMENT, "shape"),
])  # fmt: skip
def test_errors_of_inference(plain: Stub, fields: dict[str, Any], code: grpc.StatusCode, text: str) -> None:
    error = refused(plain.ModelInfer, **fields)
    assert error.code() == code and text in error.details()


def test_errors_of_the_others(plain: Stub) -> None:
    error = refused(plain.ModelReady)
    assert error.code() == Code.INTERNAL and error.details().startswith("Parameter name is required.")
    for call in (plain.ModelReady, plain.ModelMetadata, plain.ModelStatistics):
        assert refused(call, name="none").code() == Code.NOT_FOUND


def test_the_limit_of_requests_is_that_of_http(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="max_request_size is 200000"):
        client.infer("linear", [tensor(np.zeros((12_501, 4), np.float32), "FP32")])
    many = client.infer("linear", [tensor(np.zeros((12_000, 4), np.float32), "FP32")])
    assert many.as_numpy("output0").shape == (12_000, 3)
