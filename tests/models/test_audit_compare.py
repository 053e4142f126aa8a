"""What counts as another answer, and what is rounding."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from pyserve.api.open_inference import InferOutput, InferRequest, InferResponse, RequestedOutput
from pyserve.api.open_inference_rest import RestTransport
from pyserve.models.audit_compare import KeptAnswer, compare
from pyserve.request.messages import Request, Response


def answer(value: Any, status: int = 200) -> KeptAnswer:
    return KeptAnswer(status, {}, json.dumps(value).encode())


def raw(*arrays: np.ndarray, names: str = "") -> KeptAnswer:
    headers = {
        "x-tensor-dtype": ",".join(str(array.dtype) for array in arrays),
        "x-tensor-shape": ";".join(",".join(map(str, array.shape)) for array in arrays),
        **({"x-tensor-name": names} if names else {}),
    }
    return KeptAnswer(200, headers, b"".join(array.tobytes() for array in arrays))


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize(
    "live, alone, expected",
    [
        (answer([1.0, 2.0]), answer([1.0, 2.0]), 0.0),
        (answer([1.0, 2.5]), answer([1.0, 2.0]), 0.25),
        (answer({"a": [1.0], "b": [4.0]}), answer({"a": [1.0], "b": [2.0]}), 1.0),
        (answer([{"x": [1.0, 5.0]}]), answer([{"x": [1.0, 4.0]}]), 0.25),
        (answer({"rows": 2}), answer({"rows": 1}), math.inf),
        (answer({"a": 1.0}), answer({"b": 1.0}), math.inf),
        (answer([1.0]), answer([1.0, 2.0]), math.inf),
        (answer("cat"), answer("dog"), math.inf),
        (answer([1.0]), answer([1.0], status=201), math.inf),
        (answer([1.0]), answer({"code": 503}, status=503), math.inf),
        (KeptAnswer(200, {}, b"cat"), KeptAnswer(200, {}, b"cat"), 0.0),
        (KeptAnswer(200, {}, b"cat"), KeptAnswer(200, {}, b"dog"), math.inf),
        (raw(floats(1, 2)), raw(floats(1, 2)), 0.0),
        (raw(floats(1, 2)), raw(floats(1, 4)), 0.5),
        (raw(floats(1, 2)), raw(floats([1], [2])), math.inf),
        (raw(floats(1), floats(3)), raw(floats(1), floats(2)), 0.5),
        (raw(floats(3), floats(1), names="b,a"), raw(floats(1), floats(2), names="a,b"), 0.5),
        (raw(np.array([7])), raw(np.array([8])), math.inf),
        (raw(floats(math.nan)), raw(floats(0)), math.inf),
        (raw(floats(1)), answer([1.0]), math.inf),
        (KeptAnswer(200, raw(floats(1, 2)).headers, b"1234"), raw(floats(1, 2)), math.inf),
    ],
)
def test_difference_of_two_answers(live: KeptAnswer, alone: KeptAnswer, expected: float) -> None:
    assert compare(live, alone).difference == pytest.approx(expected)


def test_raw_bfloat16_is_compared_with_float32_as_numbers() -> None:
    value = torch.tensor([1.0, 2.0])
    headers = {"x-tensor-dtype": "bfloat16", "x-tensor-shape": "2"}
    live = KeptAnswer(200, headers, value.bfloat16().view(torch.uint8).numpy().tobytes())
    assert compare(live, raw(floats(1, 4))).difference == 0.5


def test_small_scores_are_measured_by_the_largest_one() -> None:
    live, alone = {"cat": 0.5, "dog": 0.0011, "cow": 0.1}, {"cat": 0.5, "dog": 0.001, "cow": 0.1}
    assert compare(answer(live), answer(alone)).difference == pytest.approx(2e-4)


def test_classes_of_nearly_equal_scores_may_change_places_at_the_end() -> None:
    live, alone = {"cat": 0.8, "dog": 0.10001}, {"cat": 0.8, "cow": 0.10002}
    assert 0 < compare(answer(live), answer(alone)).difference < 1e-4


def test_another_class_with_a_much_higher_score_is_a_difference() -> None:
    live, alone = {"cat": 0.8, "dog": 0.1}, {"cat": 0.8, "cow": 0.5}
    assert compare(answer(live), answer(alone)).difference == pytest.approx(0.5)


def test_scores_of_quite_other_classes_are_no_rounding() -> None:
    assert math.isinf(compare(answer({"cat": 0.8, "dog": 0.1}), answer({"cow": 0.8, "pig": 0.1})).difference)


@pytest.mark.parametrize("is_binary", [False, True])
def test_outputs_of_the_open_inference_protocol_are_compared_as_numbers(is_binary: bool) -> None:
    def encoded(name: str, tensor: torch.Tensor, text: bytes) -> KeptAnswer:
        wanted = [RequestedOutput(each, {"binary_data": True}) for each in (name, "text")]
        request = InferRequest([], outputs=wanted if is_binary else [])
        outputs = [InferOutput(name, tensor), InferOutput("text", [text])]
        transport = RestTransport(Request("POST", "/"), 1 << 20)
        return KeptAnswer.of(transport.encode(request, InferResponse("m", "1", outputs, "")))

    alone = encoded("output0", torch.tensor([[1.0, 2.0]]), b"cat")
    # Lanes name outputs in their own way, and may answer in another width.
    assert compare(encoded("scores", torch.tensor([[1.0, 2.0]], dtype=torch.float64), b"cat"), alone).difference == 0.0
    assert compare(encoded("scores", torch.tensor([[1.0, 2.5]]), b"cat"), alone).difference == 0.25
    assert math.isinf(compare(encoded("scores", torch.tensor([[1.0], [2.0]]), b"cat"), alone).difference)
    assert math.isinf(compare(encoded("scores", torch.tensor([[1.0, 2.0]]), b"dog"), alone).difference)


def test_kept_answer_is_a_copy_with_all_its_parts() -> None:
    memory = bytearray(b"abc")
    response = Response(200, memoryview(memory), headers={"X-Tensor-Dtype": "float32"})
    response.tail = [memoryview(memory)[:1], b"!"]
    kept = KeptAnswer.of(response)
    memory[:] = b"xyz"
    assert kept == KeptAnswer(200, {"x-tensor-dtype": "float32"}, b"abca!")
