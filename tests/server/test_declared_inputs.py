"""Declared sizes and values hold on every way into a real server, in both lanes, before the model runs."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from pyserve.grpc_api.messages import OPEN_INFERENCE
from tests.support.grpc_calls import Stub, stub
from tests.support.serving import JSON, RAW, Answer, Server
from tests.support.serving_models import write_eager, write_torchscript

pytestmark = pytest.mark.server

IDS = {"dtype": "int64", "shape": ["2..4"], "vocabulary": 10}
MASKED = [
    {"name": "ids", **IDS, "same": "length", "pad_to": [3, 4]},
    {"name": "mask", "dtype": "float32", "shape": [-1], "same": "length", "pad_to": [3, 4], "values": [0, 1]},
]
PYTHON = {"conversion": "python", "minWorkers": 1, "maxWorkers": 1}
# Neither traced nor scripted, so that worker processes run it.
EAGER = """
import torch


class Sums(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros({rows}))

    def forward(self, {arguments}):
        if torch.jit.is_tracing() or torch.jit.is_scripting():
            raise RuntimeError("not to be converted")
        try:
            return {result}
        except IndexError as error:
            raise RuntimeError("out of range") from error
"""


class Lookup(torch.nn.Module):
    """ids [n, length] -> sum of their entries in a table [n]; what is out of range reads beyond it or fails."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.arange(10.0) ** 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids].sum(1)


class Masked(torch.nn.Module):
    """ids, mask [n, length] -> sum of what the mask weighs [n]."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (ids * mask).sum(1)


class Nested(torch.nn.Module):
    """x [n, 2] -> x, nothing, and both halves by name."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
        return x, None, {"left": x[:, 0], "right": x[:, 1]}


class Sometimes(torch.nn.Module):
    """x [n, 1] -> x, and its double if all of the batch are above 0."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        double: torch.Tensor | None = x * 2
        if bool((x <= 0).any()):
            double = None
        return x, double, x * 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("declared"))
    store = server.store
    write_torchscript(store, Lookup(), "native", config={"input": IDS, "batchSize": 4})
    write_torchscript(store, Masked(), "masked", config={"input": MASKED, "batchSize": 4})
    write_torchscript(store, Nested(), "nested", config={"input": {"shape": [2]}, "output": ["x", "none", "halves"]})
    write_torchscript(store, Sometimes(), "sometimes", config={"input": {"shape": [1]}})
    source = EAGER.format(rows=10, arguments="ids", result="self.table[ids].sum(1)")
    table = {"table": torch.arange(10.0) ** 2}
    write_eager(store, "python", source, table, config={"input": IDS, **PYTHON})
    source = EAGER.format(rows=1, arguments="ids, mask", result="(ids * mask).sum(1)")
    config = {"input": MASKED, "output": "weighed", **PYTHON}
    write_eager(store, "masked-python", source, {"table": torch.zeros(1)}, config=config)
    source = EAGER.format(rows=1, arguments="x", result="x")
    for dtype in ("float16", "bfloat16", "bool"):
        write_torchscript(store, torch.nn.Identity(), f"same-{dtype}", config={"input": {"dtype": dtype, "shape": [3]}})
        config = {"input": {"dtype": dtype, "shape": [3]}, **PYTHON}
        write_eager(store, f"same-{dtype}-python", source, {"table": torch.zeros(1)}, config=config)
    with server:
        server.start("--models", "all", "--grpc", "true")
        yield server


@pytest.fixture(scope="module")
def calls(server: Server) -> Iterator[Stub]:
    with stub(server, f"{OPEN_INFERENCE}.GRPCInferenceService") as made:
        yield made


def test_both_lanes_are_tried(server: Server) -> None:
    lanes = {name: server.describe(name)["lane"] for name in ("native", "masked", "python", "masked-python")}
    assert lanes == {"native": "native", "masked": "native", "python": "python", "masked-python": "python"}


# --- ways in ----------------------------------------------------------------------------------------------------------

Told = tuple[int, str, float | None]  # status, text of the error, what the model computed


def told(answer: Answer, number: Callable[[Answer], float]) -> Told:
    if answer.status != 200:
        return answer.status, answer.json["message"], None
    return 200, "", number(answer)


def by_json(server: Server, model: str, ids: list[int]) -> Told:
    return told(server.predict(model, ids), lambda answer: answer.json)


def by_bytes(server: Server, model: str, ids: list[int]) -> Told:
    answer = server.ask("POST", f"/predictions/{model}", np.array(ids, "<i8").tobytes(), RAW)
    return told(answer, lambda answer: np.frombuffer(answer.body, "<f4")[0])


def by_form(server: Server, model: str, ids: list[int]) -> Told:
    head = 'Content-Disposition: form-data; name="data"; filename="x"\r\nContent-Type: application/json'
    body = f"--B\r\n{head}\r\n\r\n{json.dumps(ids)}\r\n--B--\r\n".encode()
    answer = server.ask("POST", f"/predictions/{model}", body, {"Content-Type": "multipart/form-data; boundary=B"})
    return told(answer, lambda answer: answer.json)


def by_v1(server: Server, model: str, ids: list[int]) -> Told:
    answer = server.ask("POST", f"/v1/models/{model}:predict", json.dumps({"instances": [ids]}).encode(), JSON)
    return told(answer, lambda answer: answer.json["predictions"][0])


def by_base64(server: Server, model: str, ids: list[int]) -> Told:
    text = base64.b64encode(np.array(ids, "<i8").tobytes()).decode()
    body = json.dumps({"instances": [{"b64": text}]}).encode()
    answer = server.ask("POST", f"/v1/models/{model}:predict", body, JSON)
    return told(answer, lambda answer: answer.json["predictions"][0])


def ids_input(ids: list[int], **more: Any) -> dict[str, Any]:
    return {"name": "ids", "datatype": "INT64", "shape": [1, len(ids)], **more}


def by_v2(server: Server, model: str, ids: list[int]) -> Told:
    body = json.dumps({"inputs": [ids_input(ids, data=ids)]}).encode()
    answer = server.ask("POST", f"/v2/models/{model}/infer", body, JSON)
    return told(answer, lambda answer: answer.json["outputs"][0]["data"][0])


def by_v2_binary(server: Server, model: str, ids: list[int]) -> Told:
    raw = np.array(ids, "<i8").tobytes()
    text = json.dumps({"inputs": [ids_input(ids, parameters={"binary_data_size": len(raw)})]}).encode()
    answer = server.ask("POST", f"/v2/models/{model}/infer", text + raw,
                        {"Inference-Header-Content-Length": str(len(text))})  # fmt: skip
    return told(answer, lambda answer: answer.json["outputs"][0]["data"][0])


def by_grpc(server: Server, model: str, ids: list[int], *, in_lists: bool) -> Told:
    data: dict[str, Any] = {"raw_input_contents": [np.array(ids, "<i8").tobytes()]}
    tensor = ids_input(ids)
    if in_lists:
        data, tensor = {}, ids_input(ids, contents={"int64_contents": ids})
    with stub(server, f"{OPEN_INFERENCE}.GRPCInferenceService") as calls:
        try:
            answer = calls.ModelInfer(model_name=model, inputs=[tensor], **data)
        except grpc.RpcError as error:
            is_callers = error.code() is grpc.StatusCode.INVALID_ARGUMENT
            return 400 if is_callers else 500, error.details(), None
        if in_lists:
            return 200, "", answer.outputs[0].contents.fp32_contents[0]
        return 200, "", np.frombuffer(answer.raw_output_contents[0], "<f4")[0]


def by_grpc_bytes(server: Server, model: str, ids: list[int]) -> Told:
    return by_grpc(server, model, ids, in_lists=False)


def by_grpc_lists(server: Server, model: str, ids: list[int]) -> Told:
    return by_grpc(server, model, ids, in_lists=True)


WAYS = [by_json, by_bytes, by_form, by_v1, by_base64, by_v2, by_v2_binary, by_grpc_bytes, by_grpc_lists]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["native", "python"])
def test_what_is_declared_holds_on_every_way_in(server: Server, model: str, way: Callable[..., Told]) -> None:
    for ids in ([0, 9], [1, 2, 3], [9, 9, 9, 9]):
        assert way(server, model, ids) == (200, "", sum(each**2 for each in ids))
    for ids, words in (
        ([1], ("2..4",)), ([1] * 5, ("2..4",)), ([1] * 5000, ("2..4",)),
        ([1, 10], ("got 10 at position [1]", "2..4] of 0 to 9")), ([1, 2, -1], ("got -1 at position [2]",)),
        ([2**62, 1], ("got 4611686018427387904 at position [0]",)),
    ):  # fmt: skip
        status, text, _ = way(server, model, ids)
        assert status == 400 and all(word in text for word in words), text


# --- numbers in JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["native", "python"])
def test_numbers_that_are_not_whole_are_refused(server: Server, model: str) -> None:
    for body in (b"[1, 2.0]", b"[1, NaN]", b"[1, Infinity]", b"[1, 1e300]", b"[1, " + b"9" * 400 + b"]", b'[1, "2"]'):
        answer = server.ask("POST", f"/predictions/{model}", body, JSON)
        assert answer.status == 400 and "whole numbers" in answer.json["message"], answer.body
    assert server.ask("POST", f"/predictions/{model}", b"[true, 3]", JSON).json == 10.0


@pytest.mark.parametrize("lane", ["", "-python"])
@pytest.mark.parametrize(("dtype", "datatype"), [("float16", "FP16"), ("bfloat16", "BF16")])
def test_halves_are_numbers_in_json(server: Server, dtype: str, datatype: str, lane: str) -> None:
    values, model = [0.1, -2.5, 1000.49], f"same-{dtype}{lane}"
    expected = torch.tensor(values, dtype=torch.float64).to(getattr(torch, dtype)).tolist()
    assert server.predict(model, values).json == expected

    def infer(data: list[Any], shape: list[int]) -> Answer:
        body = {"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": data}]}
        return server.ask("POST", f"/v2/models/{model}/infer", json.dumps(body).encode(), JSON)

    answer = infer([*values, 3, 4, 5], [2, 3])
    (output,) = answer.json["outputs"]
    assert (output["datatype"], output["shape"], output["data"]) == (datatype, [2, 3], [*expected, 3.0, 4.0, 5.0])
    for largest in ([1, 2, 3.4e38 * 10], [1, 10**39, 3]):
        assert infer(largest, [1, 3]).status == server.predict(model, largest).status == 400
    assert "beyond" in infer([1, 2, 1e39], [1, 3]).json["message"]


@pytest.mark.parametrize("lane", ["", "-python"])
def test_advice_on_halves_works(server: Server, calls: Stub, lane: str) -> None:
    model, raw = f"same-float16{lane}", np.array([1, 2, 3], "<f2").tobytes()
    tensor: dict[str, Any] = {"name": "x", "datatype": "FP16", "shape": [1, 3]}
    with pytest.raises(grpc.RpcError) as refused:
        calls.ModelInfer(model_name=model, inputs=[tensor])
    assert "FP16, which goes as raw_input_contents" in refused.value.details()
    answer = calls.ModelInfer(model_name=model, inputs=[tensor], raw_input_contents=[raw])
    assert answer.raw_output_contents[0] == raw
    # A text that names another datatype is right about it.
    body = {"inputs": [{**tensor, "datatype": "FP32", "data": [1, 2, 3]}]}
    answer = server.ask("POST", f"/v2/models/{model}/infer", json.dumps(body).encode(), JSON)
    assert answer.status == 400 and "must be FP16" in answer.json["message"]
    body["inputs"][0]["datatype"] = "FP16"
    answer = server.ask("POST", f"/v2/models/{model}/infer", json.dumps(body).encode(), JSON)
    assert answer.json["outputs"][0]["data"] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("lane", ["", "-python"])
def test_a_raw_byte_that_is_no_bool_is_refused(server: Server, lane: str) -> None:
    assert server.ask("POST", f"/predictions/same-bool{lane}", b"\0\1\1", RAW).body == b"\0\1\1"
    answer = server.ask("POST", f"/predictions/same-bool{lane}", b"\0\1\2", RAW)
    assert answer.status == 400 and "the byte 2 at 2" in answer.json["message"]


# --- several inputs ---------------------------------------------------------------------------------------------------


def masked(ids: list[int], mask: list[float], **more: Any) -> dict[str, Any]:
    inputs = [ids_input(ids, data=ids),
              {"name": "mask", "datatype": "FP32", "shape": [1, len(mask)], "data": mask}]  # fmt: skip
    return {"inputs": inputs, **more}


def form_of_bytes(ids: list[int], mask: list[float]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a form with an input's numbers in each part."""
    body = b""
    for name, raw in (("ids", np.array(ids, "<i8").tobytes()), ("mask", np.array(mask, "<f4").tobytes())):
        head = f'Content-Disposition: form-data; name="{name}"; filename="f"\r\nContent-Type: {RAW["Content-Type"]}'
        body += f"--B\r\n{head}\r\n\r\n".encode() + raw + b"\r\n"
    return body + b"--B--\r\n", {"Content-Type": "multipart/form-data; boundary=B"}


@pytest.mark.parametrize("model", ["masked", "masked-python"])
def test_a_mask_of_another_length_is_refused_by_grpc(server: Server, model: str) -> None:
    def ask(ids: list[int], mask: list[float]) -> Any:
        fields = {"ids": np.array(ids, "<i8").tobytes(), "mask": np.array(mask, "<f4").tobytes()}
        with stub(server) as calls:
            return calls.Predictions(model_name=model, input=fields).prediction

    assert np.frombuffer(ask([9, 9, 9], [0.5, 0.5, 0.5]), "<f4").tolist() == [13.5]
    with pytest.raises(grpc.RpcError, match="'ids' has 3, 'mask' has 2"):
        ask([9, 9, 9], [1, 1])


@pytest.mark.parametrize("model", ["masked", "masked-python"])
def test_a_mask_of_another_length_is_refused(server: Server, model: str) -> None:
    def ask(ids: list[int], mask: list[float]) -> list[Answer]:
        plain, v2 = {"ids": ids, "mask": mask}, masked(ids, mask)
        return [
            server.ask("POST", f"/predictions/{model}", json.dumps(plain).encode(), JSON),
            server.ask("POST", f"/v1/models/{model}:predict", json.dumps({"instances": [plain]}).encode(), JSON),
            server.ask("POST", f"/v2/models/{model}/infer", json.dumps(v2).encode(), JSON),
            server.ask("POST", f"/predictions/{model}", *form_of_bytes(ids, mask)),
        ]

    for length in (2, 3, 4):
        plain, v1, v2, form = ask([9] * length, [0.5] * length)
        (output,) = v2.json["outputs"]
        assert plain.json == v1.json["predictions"][0] == output["data"][0] == form.json == 4.5 * length
    for answer in ask([9, 9, 9], [1, 1]):
        assert answer.status == 400, answer.body
        assert "share the dimension 'length', but 'ids' has 3, 'mask' has 2" in answer.json["message"]


@pytest.mark.parametrize("model", ["masked", "masked-python"])
def test_inputs_are_given_once_and_by_their_names(server: Server, model: str) -> None:
    def ask(inputs: list[Any], outputs: list[str] | None = None) -> Answer:
        body = {"inputs": inputs} | ({"outputs": [{"name": name} for name in outputs]} if outputs else {})
        return server.ask("POST", f"/v2/models/{model}/infer", json.dumps(body).encode(), JSON)

    ids, mask = masked([1, 2], [1, 1])["inputs"]
    name = "weighed" if model == "masked-python" else "output0"
    assert ask([mask, ids], [name]).json["outputs"][0]["data"] == [3.0]
    for inputs, outputs, says in (
        ([ids, mask, ids], None, "same name"), ([ids, {**mask, "name": "musk"}], None, "inputs are 'ids', 'mask'"),
        ([ids], None, "inputs are 'ids', 'mask'"), ([ids, mask, {**mask, "name": "b"}], None, "got 'ids', 'mask', 'b'"),
        ([ids, mask], ["nobody"], f"its outputs are '{name}'"), ([ids, mask], [name, name], "asked for twice"),
        ([ids, {**mask, "datatype": "INT32"}], None, "must be FP32"),
        ([ids, {**mask, "data": [1, 2]}], None, "got 2.0 at position [1]"),
        ([ids, {**mask, "shape": [2, 2], "data": [1, 1, 1, 1]}], None, "different numbers of rows"),
    ):  # fmt: skip
        answer = ask(inputs, outputs)
        assert answer.status == 400 and says in answer.json["message"], answer.body


def test_numbers_of_another_datatype_are_no_row_for_a_worker(server: Server) -> None:
    # As many bytes as two whole numbers have.
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
    answer = server.ask("POST", "/v2/models/python/infer", json.dumps(body).encode(), JSON)
    assert answer.status == 400 and "must be INT64" in answer.json["message"]


def test_metadata_of_workers_names_inputs(server: Server) -> None:
    about = server.ask("GET", "/v2/models/masked-python").json
    assert about["inputs"] == [
        {"name": "ids", "datatype": "INT64", "shape": [-1, -1]}, {"name": "mask", "datatype": "FP32", "shape": [-1, -1]}
    ]  # fmt: skip
    assert about["outputs"] == []


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_nested_outputs_keep_their_form_or_say_what_does(server: Server) -> None:
    assert server.predict("nested", [1, 2]).json == [[1.0, 2.0], None, {"left": 1.0, "right": 2.0}]
    raw = np.array([1, 2], "<f4").tobytes()
    answer = server.ask("POST", "/predictions/nested", raw, RAW)
    assert answer.status == 400 and answer.json["message"].startswith("output 'none' is None")
    answer = server.ask("POST", "/predictions/nested", raw, {**RAW, "Accept": "application/json"})
    assert answer.json == [[1.0, 2.0], None, {"left": 1.0, "right": 2.0}]


def test_outputs_of_the_protocol_are_those_of_its_metadata(server: Server) -> None:
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}]}
    outputs = server.ask("POST", "/v2/models/nested/infer", json.dumps(body).encode(), JSON).json["outputs"]
    assert {each["name"]: each["data"] for each in outputs} == {
        "x": [1.0, 2.0, 3.0, 4.0], "halves.left": [1.0, 3.0], "halves.right": [2.0, 4.0]
    }  # fmt: skip
    listed = server.ask("GET", "/v2/models/nested").json["outputs"]
    assert [each["name"] for each in listed] == [each["name"] for each in outputs]
    asked = body | {"outputs": [{"name": "none"}]}
    answer = server.ask("POST", "/v2/models/nested/infer", json.dumps(asked).encode(), JSON)
    assert answer.status == 400 and "no output 'none', or it is None here" in answer.json["message"]


def test_an_output_that_is_none_is_missing_and_the_others_keep_their_names(server: Server) -> None:
    def ask(values: list[float], *outputs: str) -> Answer:
        tensor = {"name": "x", "datatype": "FP32", "shape": [len(values), 1], "data": values}
        body = {"inputs": [tensor]} | ({"outputs": [{"name": name} for name in outputs]} if outputs else {})
        return server.ask("POST", "/v2/models/sometimes/infer", json.dumps(body).encode(), JSON)

    def told(answer: Answer) -> dict[str, list[float]]:
        return {each["name"]: each["data"] for each in answer.json["outputs"]}

    assert told(ask([1.0])) == {"output0": [1.0], "output1": [2.0], "output2": [3.0]}
    assert told(ask([-1.0])) == {"output0": [-1.0], "output2": [-3.0]}
    assert told(ask([-1.0], "output2", "output0")) == {"output2": [-3.0], "output0": [-1.0]}
    refused = ask([-1.0], "output1")
    assert refused.status == 400 and "no output 'output1', or it is None here" in refused.json["message"]
    # Each row ran alone, and one has what the other does not.
    mixed = ask([1.0, -1.0])
    assert mixed.status == 503 and "None for some rows" in json.dumps(mixed.json), mixed.body
    assert server.predict("sometimes", [-1]).json == [[-1.0], None, [-3.0]]
