"""The Open Inference Protocol over HTTP as its own client speaks it, and as broken clients do (a real server)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from pyserve.models.sample import write_sample_picture
from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, RAW, Server, at_once
from tests.support.serving_models import LINEAR_INPUT, Linear, write_linear, write_pictures, write_torchscript

pytestmark = pytest.mark.server


class Pair(torch.nn.Module):
    """a [n, 2], b [n, 3] -> their sums [n] and the difference of these [n, 1]."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = a.sum(1).double(), b.sum(1).double()
        return left + right, (left - right).unsqueeze(1)


class Echo(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Picky(torch.nn.Module):
    """Fails for a row that holds 666."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x == 666.0).any()):
            raise RuntimeError("poisoned input")
        return x


# Answers in the protocol, and says what it got.
OWN = """
def handle(data, context):
    if data is None:
        return None
    answers = []
    for row in data:
        value = row["body"]
        outputs = [{**each, "name": "seen " + each["name"]} for each in value["inputs"]]
        answers.append({"id": value.get("id"), "model_name": "own", "model_version": "1.0", "outputs": outputs})
    return answers
"""

DTYPES = {"bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
          "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "bfloat16": "BF16",
          "float32": "FP32", "float64": "FP64"}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("v2"))
    store = server.store
    write_linear(store)
    write_linear(store, version="2.0", seed=2, file="second-linear")
    write_torchscript(store, Linear(), "batched", config={"input": LINEAR_INPUT, "batchSize": 4, "output": "scores"})
    pair = [{"name": "a", "dtype": "float32", "shape": [2]}, {"name": "b", "dtype": "int64", "shape": [3]}]
    write_torchscript(store, Pair(), "pair", config={"input": pair, "output": ["sum", "difference"], "batchSize": 3})
    for dtype in DTYPES:
        write_torchscript(store, Echo(), f"echo-{dtype}", config={"input": {"dtype": dtype, "shape": [-1]}})
    write_torchscript(store, Picky(), "picky", config={"input": {"dtype": "float32", "shape": [1]}, "batchSize": 4})
    write_pictures(store)
    write_handler(store, "own", OWN)
    with server:
        server.start("--models", "all")
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with triton.InferenceServerClient("{}:{}".format(*server.address())) as client:
        yield client


def tensor_input(name: str, values: Any, datatype: str, *, binary: bool) -> Any:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def rows(count: int, size: int = 4) -> Any:
    return np.random.default_rng(count).standard_normal((count, size)).astype(np.float32)


def expected(values: Any, seed: int = 0) -> Any:
    return Linear(seed)(torch.from_numpy(values)).detach().numpy()


def test_the_client_sees_a_server_that_is_ready(client: Any) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("linear") and client.is_model_ready("linear", "2.0")
    assert not client.is_model_ready("nobody")
    about = client.get_server_metadata()
    assert about["name"] == "pyserve" and "binary_tensor_data" in about["extensions"]
    assert about["extenstion"] == ["kserve", "kubeflow"]


def test_metadata_names_inputs_and_outputs(client: Any) -> None:
    assert client.get_model_metadata("pair") == {
        "name": "pair", "versions": ["1.0"], "platform": "pytorch_torchscript",
        "inputs": [
            {"name": "a", "datatype": "FP32", "shape": [-1, 2]}, {"name": "b", "datatype": "INT64", "shape": [-1, 3]},
        ],
        "outputs": [
            {"name": "sum", "datatype": "FP64", "shape": [-1]},
            {"name": "difference", "datatype": "FP64", "shape": [-1, 1]},
        ],
    }  # fmt: skip
    about = client.get_model_metadata("linear", "2.0")
    assert sorted(about["versions"]) == ["1.0", "2.0"]
    assert (about["inputs"][0]["name"], about["outputs"][0]["name"]) == ("input0", "output0")
    pictures = client.get_model_metadata("pictures")
    assert pictures["inputs"] == [{"name": "input0", "datatype": "BYTES", "shape": [-1]}]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
@pytest.mark.parametrize("count", [1, 3, 200])
@pytest.mark.parametrize("model", ["linear", "batched"])
def test_any_number_of_rows_in_either_form(
    client: Any, model: str, count: int, binary_in: bool, binary_out: bool | None
) -> None:
    values = rows(count)
    name = "scores" if model == "batched" else "output0"
    outputs = None if binary_out is None else [triton.InferRequestedOutput(name, binary_data=binary_out)]
    answer = client.infer(model, [tensor_input("x", values, "FP32", binary=binary_in)], outputs=outputs, request_id="7")
    np.testing.assert_allclose(answer.as_numpy(name), expected(values), rtol=1e-5, atol=1e-5)
    told = answer.get_response()
    assert (told["id"], told["model_name"], told["model_version"]) == ("7", model, "1.0")
    is_binary = binary_out is not False
    assert ("binary_data_size" in told["outputs"][0].get("parameters", {})) == is_binary


def test_a_version_is_chosen_by_the_path(client: Any) -> None:
    values = rows(2)
    answer = client.infer("linear", [tensor_input("x", values, "FP32", binary=True)], model_version="2.0")
    np.testing.assert_allclose(answer.as_numpy("output0"), expected(values, 2), rtol=1e-5, atol=1e-5)
    assert answer.get_response()["model_version"] == "2.0"


@pytest.mark.parametrize("binary", [True, False])
def test_several_inputs_and_outputs(client: Any, binary: bool) -> None:
    a, b = rows(7, 2), np.arange(21, dtype=np.int64).reshape(7, 3)
    inputs = [tensor_input("b", b, "INT64", binary=binary), tensor_input("a", a, "FP32", binary=not binary)]
    answer = client.infer("pair", inputs)
    np.testing.assert_allclose(answer.as_numpy("sum"), a.sum(1) + b.sum(1), rtol=1e-6)
    np.testing.assert_allclose(answer.as_numpy("difference")[:, 0], a.sum(1) - b.sum(1), rtol=1e-6)
    wanted = [triton.InferRequestedOutput("difference", binary_data=binary)]
    told = client.infer("pair", inputs, outputs=wanted).get_response()
    assert [output["name"] for output in told["outputs"]] == ["difference"]


def test_several_inputs_by_name_or_one_after_the_other_on_predictions(server: Server) -> None:
    told = server.ask("POST", "/predictions/pair", b'{"a": [1, 2], "b": [3, 4, 5]}', JSON)
    assert (told.status, told.json) == (200, [15.0, [-9.0]])
    raw = np.array([1, 2], np.float32).tobytes() + np.array([3, 4, 5], np.int64).tobytes()
    told = server.ask("POST", "/predictions/pair", raw, RAW)
    assert np.frombuffer(told.body).tolist() == [15.0, -9.0]
    assert server.ask("POST", "/predictions/pair", raw[:-1], RAW).status == 400


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_datatype_goes_in_and_comes_back(server: Server, dtype: str) -> None:
    datatype, itemsize = DTYPES[dtype], getattr(torch, dtype).itemsize
    raw = bytes([1, 0] * 8 * itemsize) if dtype == "bool" else bytes(range(1, 1 + 8 * itemsize))
    raw = raw[: 8 * itemsize]
    shape = [2, 4]
    entry = {"name": "x", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(raw)}}
    head: dict[str, Any] = {"inputs": [entry], "parameters": {"binary_data_output": True}}
    for padding in range(9):  # the numbers lie anywhere in the body
        text = json.dumps(head).encode() + b" " * padding
        answer = server.ask("POST", f"/v2/models/echo-{dtype}/infer", text + raw,
                            {"Inference-Header-Content-Length": str(len(text))})  # fmt: skip
        size = int(answer.headers["inference-header-content-length"])
        (output,) = json.loads(answer.body[:size])["outputs"]
        assert (output["datatype"], output["shape"], answer.body[size:]) == (datatype, shape, raw)
    del head["parameters"]
    text = json.dumps(head).encode()
    answer = server.ask("POST", f"/v2/models/echo-{dtype}/infer", text + raw,
                        {"Inference-Header-Content-Length": str(len(text))})  # fmt: skip
    data = answer.json["outputs"][0]["data"]
    values = torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)).tolist()
    assert len(data) == 8 and all(np.isclose(got, want) for got, want in zip(data, values, strict=True))
    nested = [data[:4], data[4:]]
    body = {"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": nested}]}
    answer = server.ask("POST", f"/v2/models/echo-{dtype}/infer", json.dumps(body).encode(), JSON)
    assert answer.json["outputs"][0]["data"] == data


def test_half_precision_by_the_client(client: Any) -> None:
    values = np.linspace(-2, 2, 6, dtype=np.float16).reshape(2, 3)
    answer = client.infer("echo-float16", [tensor_input("x", values, "FP16", binary=True)])
    np.testing.assert_array_equal(answer.as_numpy("output0"), values)


def test_asynchronous_requests_share_batches(client: Any) -> None:
    values = [rows(count) for count in (1, 5, 2, 9)]
    pending = [client.async_infer("batched", [tensor_input("x", each, "FP32", binary=True)]) for each in values]
    for each, request in zip(values, pending, strict=True):
        np.testing.assert_allclose(request.get_result().as_numpy("scores"), expected(each), rtol=1e-5, atol=1e-5)


def test_many_clients_and_sizes_get_their_own_answers(server: Server) -> None:
    def ask(count: int) -> bool:
        values = rows(count)
        body = {"inputs": [{"name": "x", "shape": [count, 4], "datatype": "FP32", "data": values.reshape(-1).tolist()}]}
        answer = server.ask("POST", "/v2/models/batched/infer", json.dumps(body).encode(), JSON)
        got = np.array(answer.json["outputs"][0]["data"]).reshape(count, 3)
        plain = server.ask("POST", "/predictions/batched", values[0].tobytes(), RAW)
        np.testing.assert_allclose(np.frombuffer(plain.body, np.float32), expected(values)[0], rtol=1e-5, atol=1e-5)
        return bool(np.allclose(got, expected(values), rtol=1e-5, atol=1e-5))

    assert all(at_once([lambda count=count: ask(count) for count in range(1, 13)]))  # type: ignore[misc]


def test_pictures_are_elements_of_bytes(server: Server, client: Any, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    write_sample_picture(path)
    picture = path.read_bytes()
    plain = server.ask("POST", "/predictions/pictures", picture, {"Content-Type": "image/jpeg"}).json
    for shape in ([2], [2, 1]):
        values = np.array([picture, picture], dtype=np.object_).reshape(shape)
        answer = client.infer("pictures", [tensor_input("image", values, "BYTES", binary=True)])
        assert [json.loads(each) for each in answer.as_numpy("output0")] == [plain, plain]
    pixels = np.zeros((2, 3, 224, 224), np.float32)
    answer = client.infer("pictures", [tensor_input("image", pixels, "FP32", binary=True)])
    assert len(answer.as_numpy("output0")) == 2
    with pytest.raises(InferenceServerException, match=r"\[400\].*picture"):
        client.infer("pictures", [tensor_input("image", np.array([b"no"], np.object_), "BYTES", binary=True)])


def test_own_handlers_get_json_also_of_binary_tensors(client: Any) -> None:
    inputs = [tensor_input("x", rows(2), "FP32", binary=True),
              tensor_input("t", np.array([b"text", b"\xff"], np.object_), "BYTES", binary=True)]  # fmt: skip
    answer = client.infer("own", inputs, request_id="9")
    np.testing.assert_array_equal(answer.as_numpy("seen x"), rows(2))
    # Never some of them: the handler could not tell which.
    assert answer.as_numpy("seen t").tolist() == [b"dGV4dA==", b"/w=="]
    assert answer.get_response()["id"] == "9"
    # As in TorchServe, what says that it is JSON is parsed, and everything else stays bytes.
    in_json = client.infer("own", [tensor_input("x", rows(2), "FP32", binary=False)], headers=dict(JSON))
    np.testing.assert_array_equal(in_json.as_numpy("seen x"), rows(2))


def test_statistics_count_rows_and_batches(server: Server, client: Any) -> None:
    def now() -> Any:
        stats, alias = client.get_inference_statistics("echo-int32")["model_stats"]
        assert alias == {**stats, "version": "1", "alias_of": "1.0"}  # perf_analyzer knows whole numbers only
        (only,) = client.get_inference_statistics("echo-int32", "1.0")["model_stats"]
        assert only["version"] == "1.0"
        counts = [stats["inference_stats"][f"compute_{part}"]["count"] for part in ("input", "infer", "output")]
        assert len(set(counts)) == 1  # or perf_analyzer ends
        return stats

    before = now()
    values = np.ones((5, 2), np.int32)
    client.infer("echo-int32", [tensor_input("x", values, "INT32", binary=True)])
    with pytest.raises(InferenceServerException):
        client.infer("echo-int32", [tensor_input("x", rows(1), "FP32", binary=True)])
    after = now()
    assert after["inference_count"] - before["inference_count"] == 5
    assert after["execution_count"] > before["execution_count"]
    changes = {key: after["inference_stats"][key]["count"] - before["inference_stats"][key]["count"]
               for key in ("success", "fail")}  # fmt: skip
    assert changes == {"success": 1, "fail": 1}
    assert after["last_inference"] >= before["last_inference"]
    everything = client.get_inference_statistics()["model_stats"]
    assert {"linear", "pair", "own"} <= {each["name"] for each in everything}


def test_one_bad_row_fails_its_request_and_nobody_elses(server: Server) -> None:
    def ask(values: list[float]) -> Any:
        body = {"inputs": [{"name": "x", "shape": [len(values), 1], "datatype": "FP32", "data": values}]}
        return server.ask("POST", "/v2/models/picky/infer", json.dumps(body).encode(), JSON)

    answers = at_once([lambda i=i: ask([1.0, 666.0, 2.0] if i == 2 else [float(i)] * 3) for i in range(6)])  # type: ignore[misc]
    assert [answer.status for answer in answers] == [200, 200, 503, 200, 200, 200]
    told = answers[2].json
    assert (told["error"], told["message"], told["detail"]["row"]) == ("Prediction failed", "Prediction failed", 1)


GOOD = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"{", "not JSON"),
        (b"{}", "inputs"),
        (b'{"inputs": []}', "inputs"),
        ({"inputs": [1]}, "name"),
        ({"inputs": [{**GOOD, "shape": "x"}]}, "shape"),
        ({"inputs": [{**GOOD, "shape": [4]}]}, "[rows, 4]"),
        ({"inputs": [{**GOOD, "shape": [-1, 4]}]}, "negative"),
        ({"inputs": [{**GOOD, "shape": [0, 4], "data": []}]}, "rows"),
        ({"inputs": [{**GOOD, "shape": [2, 4]}]}, "8 values"),
        ({"inputs": [{**GOOD, "shape": [10**9, 4]}]}, "values"),
        ({"inputs": [{**GOOD, "shape": [2**62, 4]}]}, "elements"),
        ({"inputs": [{**GOOD, "shape": [0, 2**70], "data": []}]}, "elements"),
        ({"inputs": [{**GOOD, "shape": [1, 0, 2**62], "data": [[]]}]}, "elements"),
        ({"inputs": [{**GOOD, "shape": [10**4000] * 64}]}, "elements"),
        ({"inputs": [{**GOOD, "datatype": "FP64"}]}, "FP32"),
        ({"inputs": [{**GOOD, "datatype": "FLOAT"}]}, "unknown datatype"),
        ({"inputs": [{**GOOD, "data": [1, 2, "x", 4]}]}, "position 2"),
        ({"inputs": [{**GOOD, "data": [[1, 2], [3, 4]]}]}, "list of 2"),
        ({"inputs": [{**GOOD, "data": None}]}, "data"),
        ({"inputs": [GOOD, GOOD]}, "inputs"),
        ({"inputs": [{**GOOD, "parameters": {"binary_data_size": 16}}]}, "binary_data_size"),
        ({"inputs": [{**GOOD, "parameters": {"shared_memory_region": "r"}}]}, "shared_memory_region"),
        ({"inputs": [GOOD], "outputs": [{"name": "nobody"}]}, "nobody"),
        ({"inputs": [GOOD], "outputs": {}}, "outputs"),
        ({"inputs": [GOOD], "output": [{"name": "output0"}]}, "a member 'output' that nothing reads"),
        ({"inputs": [{**GOOD, "mask": [1, 1, 0, 0]}]}, "a member 'mask' that nothing reads"),
        ({"inputs": [GOOD], "outputs": [{"name": "output0", "binary_data": True}]}, "'binary_data' that nothing reads"),
        (json.dumps({"inputs": [GOOD]})[:-1].encode() + b', "inputs": []}', "'inputs' more than once"),
        ({"inputs": [GOOD], "outputs": [{"name": "output0", "parameters": {"classification": 2}}]}, "classification"),
    ],
)
def test_what_cannot_be_used_is_400_and_says_why(server: Server, body: Any, word: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.ask("POST", "/v2/models/linear/infer", raw, JSON)
    told = answer.json
    assert (answer.status, told["code"], told["type"]) == (400, 400, "BadRequestException"), answer.body
    assert told["error"] == told["message"] and word in told["error"], told["error"]


@pytest.mark.parametrize(
    "entry",
    [
        {**GOOD, "name": "n" * 1_000_000, "datatype": "FP64"},
        {**GOOD, "datatype": "T" * 1_000_000},
        {**GOOD, "shape": [1] * 500_000},
        {**GOOD, "parameters": {"binary_data_size": "s" * 1_000_000}},
    ],
)
@pytest.mark.parametrize("model", ["linear", "pair"])
def test_a_clients_own_words_do_not_come_back_at_length(server: Server, model: str, entry: Any) -> None:
    body = json.dumps({"inputs": [entry, {**entry, "name": "m" * 1_000_000}] if model == "pair" else [entry]})
    answer = server.ask("POST", f"/v2/models/{model}/infer", body.encode(), JSON)
    assert answer.status == 400 and len(answer.body) < 3000, len(answer.body)


def test_a_byte_that_is_no_truth_value_is_400(server: Server) -> None:
    for content, status in ((b"\0\1\1", 200), (b"\0\2\1", 400)):
        entry = {"name": "x", "shape": [1, 3], "datatype": "BOOL", "parameters": {"binary_data_size": 3}}
        text = json.dumps({"inputs": [entry]}).encode()
        answer = server.ask("POST", "/v2/models/echo-bool/infer", text + content,
                            {"Inference-Header-Content-Length": str(len(text))})  # fmt: skip
        assert answer.status == status, answer.body


@pytest.mark.parametrize("size", ["x", "00", "-1", "999999", "1" * 50, "7.5"])
def test_a_wrong_size_of_the_json_is_400(server: Server, size: str) -> None:
    body = json.dumps({"inputs": [GOOD]}).encode()
    answer = server.ask("POST", "/v2/models/linear/infer", body, {"Inference-Header-Content-Length": size})
    assert answer.status == 400 and "Inference-Header-Content-Length" in answer.json["error"], answer.body


def test_binary_data_that_does_not_fit_is_400(server: Server) -> None:
    for announced, sent in ((16, 15), (16, 17), (12, 12), (20, 20)):
        entry = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": announced}}
        text = json.dumps({"inputs": [entry]}).encode()
        answer = server.ask("POST", "/v2/models/linear/infer", text + bytes(sent),
                            {"Inference-Header-Content-Length": str(len(text))})  # fmt: skip
        assert answer.status == 400 and "bytes" in answer.json["error"], answer.body


@pytest.mark.parametrize("path", ["/v2/models/nobody", "/v2/models/nobody/ready", "/v2/models/nobody/stats",
                                  "/v2/models/nobody/infer", "/v2/models/linear/versions/9/infer",
                                  "/v2/models/linear/versions/9", "/v2/nothing"])  # fmt: skip
def test_unknown_names_are_404_with_the_error_in_both_forms(server: Server, path: str) -> None:
    answer = server.ask("GET" if not path.endswith("infer") else "POST", path)
    assert answer.status == 404 and answer.json["error"] == answer.json["message"]


def test_errors_of_other_paths_are_torchserves_alone(server: Server) -> None:
    assert set(server.ask("POST", "/predictions/nobody").json) == {"code", "type", "message", "detail"}


# --- what Triton has beside the protocol ------------------------------------------------------------------------------


def test_a_body_without_json_is_the_one_input(server: Server, tmp_path: Path) -> None:
    header = {"Inference-Header-Content-Length": "0", **RAW}
    values = rows(3)
    answer = server.ask("POST", "/v2/models/linear/infer", values.tobytes(), header)
    (output,) = answer.json["outputs"]
    assert output["shape"][0] == 3
    np.testing.assert_allclose(
        np.array(output["data"]).reshape(output["shape"]), expected(values), rtol=1e-5, atol=1e-5
    )
    answer = server.ask("POST", "/v2/models/echo-int16/infer", np.arange(5, dtype="<i2").tobytes(), header)
    assert [(each["shape"], each["data"]) for each in answer.json["outputs"]] == [([1, 5], [0, 1, 2, 3, 4])]
    path = tmp_path / "picture.jpg"
    write_sample_picture(path)
    plain = server.ask("POST", "/predictions/pictures", path.read_bytes(), RAW).json
    (output,) = server.ask("POST", "/v2/models/pictures/infer", path.read_bytes(), header).json["outputs"]
    assert [json.loads(each) for each in output["data"]] == [plain]
    for model, body, word in (
        ("linear", b"", "whole rows"),
        ("linear", bytes(15), "whole rows"),
        ("pair", bytes(32), "has 2"),
    ):
        refused = server.ask("POST", f"/v2/models/{model}/infer", body, header)
        assert refused.status == 400 and word in refused.json["error"], refused.body


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_the_clients_compression_is_undone(client: Any, algorithm: str) -> None:
    values = rows(2)
    for model in ("linear", "own"):
        given = tensor_input("x", values, "FP32", binary=True)
        answer = client.infer(model, [given], request_compression_algorithm=algorithm)
        if model == "linear":
            np.testing.assert_allclose(answer.as_numpy("output0"), expected(values), rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(answer.as_numpy("seen x"), values)


def test_the_index_names_models_and_their_states(server: Server, client: Any) -> None:
    index = client.get_model_repository_index()
    assert {"name": "linear", "version": "2.0", "state": "READY", "reason": ""} in index
    server.manage("PUT", "/models/picky?min_worker=0&synchronous=true")
    try:
        states = {row["name"]: row["state"] for row in client.get_model_repository_index()}
        assert states["picky"] == "UNAVAILABLE"
        ready = server.ask("POST", "/v2/repository/index", b'{"ready": true}', JSON).json
        assert "picky" not in [row["name"] for row in ready] and len(ready) >= 2
    finally:
        server.manage("PUT", "/models/picky?min_worker=1&synchronous=true")
    for body in (b"[1]", b'{"ready": 1}', b"x"):
        assert server.ask("POST", "/v2/repository/index", body, JSON).status == 400


def test_shared_memory_is_empty_and_refused_by_name(client: Any) -> None:
    assert client.get_system_shared_memory_status() == client.get_cuda_shared_memory_status() == []
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory("mine")
    for call in (
        lambda: client.register_system_shared_memory("mine", "/key", 16),
        lambda: client.register_cuda_shared_memory("mine", b"handle", 0, 16),
        lambda: client.get_system_shared_memory_status("mine"),
    ):
        with pytest.raises(triton.InferenceServerException, match="shared_memory'; send tensors in the body"):
            call()
    given, wanted = triton.InferInput("x", [1, 4], "FP32"), triton.InferRequestedOutput("output0")
    given.set_shared_memory("mine", 16)
    wanted.set_shared_memory("mine", 16)
    for inputs, outputs in (([given], None), ([tensor_input("x", rows(1), "FP32", binary=True)], [wanted])):
        with pytest.raises(triton.InferenceServerException, match="shared memory; send the tensor in the body"):
            client.infer("linear", inputs, outputs=outputs)


def test_other_extensions_are_refused_by_name(client: Any) -> None:
    for call, name in (
        (lambda: client.load_model("linear"), "model_repository"),
        (lambda: client.unload_model("linear"), "model_repository"),
        (client.get_trace_settings, "trace"),
        (lambda: client.update_trace_settings("linear", {"trace_rate": "1"}), "trace"),
        (client.get_log_settings, "logging"),
    ):
        with pytest.raises(triton.InferenceServerException, match=f"does not have the extension '{name}'"):
            call()


def test_the_client_shows_what_the_http_layer_refuses(client: Any) -> None:
    given = [tensor_input("x", rows(1), "FP32", binary=True)]
    for headers, status, word in (
        ({"Expect": "x"}, 417, "Expect"), ({"X": "a" * 70_000}, 431, "head is over"),
        ({"Content-Encoding": "br"}, 415, "gzip or deflate"),
    ):  # fmt: skip
        with pytest.raises(triton.InferenceServerException, match=word) as caught:
            client.infer("linear", given, headers=headers)
        assert caught.value.status() == str(status)
    with pytest.raises(triton.InferenceServerException, match="max_request_size"):
        client.infer("linear", [tensor_input("x", rows(500_000), "FP32", binary=True)])


# --- version 1 ----------------------------------------------------------------------------------------------------


def test_v1_clients_see_a_server_that_is_alive(server: Server) -> None:
    assert server.ask("GET", "/").json == {"status": "alive"}
    assert server.ask("POST", "/").status == 405


def test_v1_instances_are_rows(server: Server) -> None:
    values = rows(5)
    instances: list[Any] = [*values[:4].tolist(), {"data": values[4].tolist()}]
    answer = server.ask("POST", "/v1/models/batched:predict", json.dumps({"instances": instances}).encode(), JSON)
    np.testing.assert_allclose(np.array(answer.json["predictions"]), expected(values), rtol=1e-5, atol=1e-5)


def test_v1_takes_bytes_as_base64(server: Server, tmp_path: Path) -> None:
    import base64

    path = tmp_path / "picture.jpg"
    write_sample_picture(path)
    plain = server.ask("POST", "/predictions/pictures", path.read_bytes(), RAW).json
    text = base64.b64encode(path.read_bytes()).decode()
    instances = [{"b64": text}, {"data": text}, {"data": {"b64": text}}, text]
    answer = server.ask("POST", "/v1/models/pictures:predict", json.dumps({"instances": instances}).encode(), JSON)
    assert answer.json == {"predictions": [plain] * 4}
    answer = server.ask("POST", "/v1/models/pictures:predict", b'{"instances": [{"b64": "!"}]}', JSON)
    assert answer.status == 400 and "instance 0" in answer.json["message"]


def test_v1_lists_models_and_their_readiness(server: Server) -> None:
    assert {"linear", "own"} <= set(server.ask("GET", "/v1/models").json["models"])
    for port in ("inference", "management"):
        assert server.ask("GET", "/v1/models/linear", port=port).json == {"name": "linear", "ready": True}
        assert server.ask("GET", "/v1/models/nobody", port=port).status == 404


@pytest.mark.parametrize("body", [
    b'{"instances": 1}', b'{"instances": []}', b'{"instances": [[1, 2]]}',
    b'{"instances": [[1, 2, 3, 4]], "inputs": [[5, 6, 7, 8]]}', b'{"instances": [{"data": [1, 2, 3, 4], "scale": 2}]}',
    b'{"instances": [[1, 2, 3, 4]], "instances": [[5, 6, 7, 8]]}',
])  # fmt: skip
def test_v1_says_what_is_wrong(server: Server, body: bytes) -> None:
    answer = server.ask("POST", "/v1/models/linear:predict", body, JSON)
    assert (answer.status, answer.json["type"]) == (400, "BadRequestException"), answer.body
