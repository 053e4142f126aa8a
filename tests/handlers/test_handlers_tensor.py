"""The tensor handler: raw bytes and nested lists in, the same kinds out, and errors that name what was expected."""

from __future__ import annotations

import logging
import math
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyserve.handler import HandlerError, InputError, ModelLoadError, PredictionException
from pyserve.handlers import tensor_spec
from pyserve.handlers.tensor import JSON, RAW, TensorHandler, accepted_kind
from pyserve.handlers.tensor_spec import TensorSpec
from tests.support.contexts import batch_of, context_for

SEED = int(os.environ.get("PYSERVE_TEST_SEED", "20"))
SHAPE_4 = {"dtype": "float32", "shape": [4]}


# --- tensors in -------------------------------------------------------------------------------------------------------


def spec(dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec.from_config({"input": {"dtype": dtype, "shape": list(shape)}})


ALL_DTYPES = ["float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"]


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_raw_and_nested_input_of_every_dtype_agree(dtype: str) -> None:
    values = [[0, 1, 1], [1, 0, 1]]
    expected = torch.tensor([values], dtype=getattr(torch, dtype))
    item = spec(dtype, 2, 3)
    raw = bytearray(expected.view(torch.uint8).numpy().tobytes())
    for tensor in (item.from_nested(values), item.from_bytes(raw), item.from_bytes(bytes(raw))):
        assert tensor.dtype is expected.dtype and torch.equal(tensor, expected)


def test_raw_input_is_not_copied() -> None:
    body = bytearray(16)
    tensor = spec("float32", 4).from_bytes(body)
    body[0:4] = struct.pack("<f", 7.0)
    assert tensor[0, 0].item() == 7.0


def test_raw_numbers_are_little_endian_on_every_host(monkeypatch: pytest.MonkeyPatch) -> None:
    body = struct.pack("<2i", 1, -2) if sys.byteorder == "little" else struct.pack(">2i", 1, -2)
    assert spec("int32", 2).from_bytes(bytearray(struct.pack("<2i", 1, -2))).tolist() == [[1, -2]]
    # Pretend the other byte order: what is swapped on the way in is swapped back on the way out.
    monkeypatch.setattr(tensor_spec, "HOST_IS_BIG_ENDIAN", not tensor_spec.HOST_IS_BIG_ENDIAN)
    swapped = spec("int32", 2).from_bytes(bytearray(body))
    assert swapped.tolist() == ([[1 << 24, -16777217]] if sys.byteorder == "little" else [[1, -2]])
    assert tensor_spec.raw_bytes(swapped) == body


def test_one_free_dimension_follows_from_the_bytes() -> None:
    assert spec("float32", -1, 2).from_bytes(bytearray(24)).shape == (1, 3, 2)
    assert spec("int8", -1).from_bytes(bytearray(5)).shape == (1, 5)


def test_free_dimensions_take_any_size_of_list() -> None:
    assert spec("float32", -1, -1).from_nested([[1, 2, 3]]).shape == (1, 1, 3)


def test_item_may_be_a_single_number() -> None:
    assert spec("float32").from_nested(2.5).tolist() == [2.5]
    assert spec("float32").from_bytes(bytearray(struct.pack("<f", 2.5))).tolist() == [2.5]


@pytest.mark.parametrize(
    ("item", "body", "text"),
    [
        (spec("float32", 4), b"", "16 bytes of little-endian float32 [4], got an empty body"),
        (spec("float32", 4), b"\0" * 15, "16 bytes of little-endian float32 [4], got 15 bytes"),
        (spec("float32", 4), b"[1, 2, 3, 4]", "Content-Type: application/json"),
        (spec("float32", -1, 2), b"\0" * 12, "a multiple of 8 bytes"),
        (spec("float32", -1, -1), b"\0" * 12, "2 free dimensions; send JSON"),
    ],
)
def test_wrong_number_of_bytes_is_named(item: TensorSpec, body: bytes, text: str) -> None:
    with pytest.raises(InputError) as caught:
        item.from_bytes(bytearray(body))
    assert text in caught.value.message


def deep_list(depth: int) -> list[Any]:
    value: list[Any] = [1.0]
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("item", "value", "text"),
    [
        (spec("float32", 2, 2), [[1, 2], [3]], "ragged list: lengths 2 and 1"),
        (spec("float32", 2, 2), [[1, 2], 3], "the number 3 where a list should be"),
        (spec("float32", 2, 2), [1, 2], "the number 1 where a list should be"),
        (spec("float32", 2, 2), [[1, 2, 3], [4, 5, 6]], "list of 3 instead of 2 at level 2"),
        (spec("float32", 2), [[1, 2]], "list of 1 instead of 2 at the top level"),
        (spec("float32", 1), [[1]], "got a list of 1 at position [0]"),
        (spec("float32", 2), [1, "x"], "got text of 1 characters starting with 'x' at position [1]"),
        (spec("float32", 2), [1, None], "got null"),
        (spec("float32", 2), [1, {"a": 1}], "JSON object"),
        (spec("float32", 2), [1, 10**400], "huge number"),
        (spec("int64", 2), [1, 2**63], "whole numbers in its range"),
        (spec("uint8", 2), [1, -1], "the number -1"),
        (spec("int64", 2), [1, 1.5], "the number 1.5"),
        (spec("bool", 2), [1, 2], "numbers other than 0 and 1"),
        (spec("float32", -1), [], "any size but 0"),
        (spec("float32", -1, -1), [[], []], "any size but 0"),
        (spec("float32", 1), 5, "where a list should be"),
        (spec("float32"), [5], "got a list of 1"),
        (spec("float32", 1, 1), deep_list(900), "got a list of 1"),
        (spec("float32", 2), "ab", "where a list should be"),
    ],
)
def test_unusable_numbers_are_named(item: TensorSpec, value: Any, text: str) -> None:
    with pytest.raises(InputError) as caught:
        item.from_nested(value)
    assert text in caught.value.message
    assert str(item) in caught.value.message


def test_random_nested_lists_become_what_torch_makes_of_them() -> None:
    print(f"PYSERVE_TEST_SEED={SEED}")
    random = np.random.default_rng(SEED)
    for _ in range(50):
        shape = [int(size) for size in random.integers(1, 6, random.integers(1, 5))]
        values = random.normal(size=shape).tolist()
        assert torch.equal(spec("float32", *shape).from_nested(values), torch.tensor([values], dtype=torch.float32))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "not described"),
        ({"input": {"dtype": "float32"}}, "no dtype and shape"),
        ({"input": "float32"}, "no dtype and shape"),
        ({"input": {"dtype": "float33", "shape": [1]}}, '"float33"'),
        ({"input": {"shape": [0]}}, "[0]"),
        ({"input": {"shape": [True]}}, "[True]"),
        ({"input": {"shape": 3}}, 'is "3"'),
    ],
)
def test_model_without_usable_input_description_is_not_served(
    tmp_path: Path, config: dict[str, Any], text: str
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        TensorHandler().prepare(context_for(tmp_path, **config))
    assert text in caught.value.message and "model-config.yaml" in caught.value.message


# --- tensors out ------------------------------------------------------------------------------------------------------


@pytest.fixture
def handler(tmp_path: Path) -> TensorHandler:
    made = TensorHandler()
    made.prepare(context_for(tmp_path, input=SHAPE_4))
    made.model = torch.nn.Identity()
    return made


def answer(handler: TensorHandler, value: Any, **headers: str) -> tuple[Any, dict[str, str]]:
    assert handler.context is not None
    batch = batch_of(handler.context, {name.replace("_", "-"): text for name, text in headers.items()})
    (result,) = handler.handle([{"body": value}], batch)
    return result, batch.get_response_headers(0)


NUMBERS = [1.0, 2.0, 3.5, -4.0]
NUMBER_BYTES = struct.pack("<4f", *NUMBERS)


def test_raw_in_gives_raw_out(handler: TensorHandler) -> None:
    result, headers = answer(handler, bytearray(NUMBER_BYTES), Content_Type="application/octet-stream")
    assert result == NUMBER_BYTES
    assert headers == {"content-type": RAW, "x-tensor-dtype": "float32", "x-tensor-shape": "4"}


def test_json_in_gives_json_out(handler: TensorHandler) -> None:
    result, headers = answer(handler, NUMBERS, Content_Type="application/json; charset=utf-8")
    assert result == NUMBERS
    assert headers == {"content-type": JSON}


def test_accept_overrides_the_kind(handler: TensorHandler) -> None:
    assert answer(handler, bytearray(NUMBER_BYTES), Accept="application/json")[0] == NUMBERS
    result, headers = answer(handler, NUMBERS, content_type="application/json", ACCEPT="application/octet-stream")
    assert result == NUMBER_BYTES and headers["x-tensor-shape"] == "4"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", None),
        ("text/html", None),
        ("application/json", JSON),
        ("Application/JSON; charset=utf-8", JSON),
        ("application/octet-stream", RAW),
        ("application/octet-stream;q=0.5, application/json", JSON),
        ("application/json;q=0.1, application/octet-stream;q=0.2, */*", RAW),
        ("application/json, application/octet-stream", None),
        ("application/json;q=0", None),
        ("application/json;q=x", None),
    ],
)
def test_accept_header_is_weighed(accept: str, kind: str | None) -> None:
    assert accepted_kind(accept) == kind


def test_kinds_may_be_mixed_in_one_batch(handler: TensorHandler) -> None:
    assert handler.context is not None
    batch = batch_of(handler.context, {"content-type": JSON}, {}, {"Accept": JSON})
    rows = [{"body": NUMBERS}, {"body": bytearray(NUMBER_BYTES)}, {"body": NUMBERS[::-1]}]
    assert handler.handle(rows, batch) == [NUMBERS, NUMBER_BYTES, NUMBERS[::-1]]
    assert [batch.get_response_content_type(i) for i in range(3)] == [JSON, RAW, JSON]
    assert "x-tensor-dtype" not in batch.get_response_headers(0)


@pytest.mark.parametrize("dtype", [*ALL_DTYPES, "complex64"])
def test_raw_answer_of_every_dtype_reads_back(handler: TensorHandler, dtype: str) -> None:
    assert handler.context is not None
    output = torch.tensor([[[0, 1, 1]], [[1, 0, 1]]], dtype=getattr(torch, dtype))
    batch = batch_of(handler.context, {"Accept": RAW}, {"Accept": RAW})
    handler.context = batch
    for i, body in enumerate(handler.postprocess(output)):
        headers = batch.get_response_headers(i)
        assert headers["x-tensor-dtype"] == dtype and headers["x-tensor-shape"] == "1,3"
        assert torch.equal(torch.frombuffer(bytearray(body), dtype=output.dtype).view(1, 3), output[i])


def test_strided_output_is_answered_row_by_row(handler: TensorHandler) -> None:
    assert handler.context is not None
    output = torch.arange(8.0).view(4, 2).t()
    handler.context = batch_of(handler.context, {}, {"Accept": JSON})
    assert handler.postprocess(output) == [struct.pack("<4f", 0, 2, 4, 6), [1.0, 3.0, 5.0, 7.0]]


def test_several_outputs_are_lists_or_bytes_in_a_row(handler: TensorHandler) -> None:
    assert handler.context is not None
    outputs = (torch.tensor([[1.0, 2.0]]), torch.tensor([7]))
    handler.context = batch_of(handler.context, {"Accept": JSON})
    assert handler.postprocess(outputs) == [[[1.0, 2.0], 7]]
    named = {"scores": outputs[0], "label": outputs[1]}
    assert handler.postprocess(named) == [{"scores": [1.0, 2.0], "label": 7}]
    handler.context = batch = batch_of(handler.context, {"Accept": RAW})
    assert handler.postprocess(named) == [struct.pack("<2fq", 1, 2, 7)]
    assert batch.get_response_headers(0) == {
        "content-type": RAW,
        "x-tensor-dtype": "float32,int64",
        "x-tensor-shape": "2;",
        "x-tensor-name": "scores,label",
    }


@pytest.mark.parametrize("output", ["text", torch.tensor(1.0), (), (torch.zeros(2, 1), torch.zeros(3, 1)), {"a": "b"}])
def test_output_that_cannot_be_split_is_the_models_fault(handler: TensorHandler, output: Any) -> None:
    assert handler.context is not None
    handler.context = batch_of(handler.context, {})
    with pytest.raises(HandlerError):
        handler.postprocess(output)


def test_complex_numbers_cannot_be_json(handler: TensorHandler) -> None:
    assert handler.context is not None
    handler.context = batch_of(handler.context, {"Accept": JSON})
    with pytest.raises(HandlerError, match="complex64"):
        handler.postprocess(torch.zeros(1, 2, dtype=torch.complex64))


def test_nan_and_infinity_become_null_and_are_told_once(
    handler: TensorHandler, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [math.nan, 1.0, math.inf, -math.inf]
    with caplog.at_level(logging.WARNING):
        assert answer(handler, bad, Content_Type=JSON)[0] == [None, 1.0, None, None]
        assert answer(handler, bad, Content_Type=JSON)[0] == [None, 1.0, None, None]
    assert [record.message for record in caplog.records] == [
        "model m answered with 3 NaN or infinite numbers, sent as null (reported once)"
    ]


def test_finite_numbers_with_an_infinite_sum_stay(handler: TensorHandler, caplog: pytest.LogCaptureFixture) -> None:
    large = [3e38, 3e38, 3e38, 0.0]
    assert answer(handler, large, Content_Type=JSON)[0] == pytest.approx(large)
    assert not caplog.records


def test_raw_answers_keep_nan(handler: TensorHandler) -> None:
    body = struct.pack("<4f", math.nan, 1, 2, 3)
    assert answer(handler, bytearray(body))[0] == body


def test_items_of_different_shapes_do_not_make_a_batch(tmp_path: Path) -> None:
    handler = TensorHandler()
    handler.prepare(context_for(tmp_path, input={"dtype": "float32", "shape": [-1]}))
    with pytest.raises(InputError, match=r"different shapes: \[1\], \[2\]"):
        handler.preprocess([{"body": [1]}, {"body": [1, 2]}])


@pytest.mark.parametrize("value", [None, True, "text", {"a": 1}])
def test_value_that_is_no_tensor_is_named(handler: TensorHandler, value: Any) -> None:
    with pytest.raises(InputError, match=r"float32 \[4\]"):
        handler.preprocess([{"body": value}])


def test_example_input_has_the_described_shape(tmp_path: Path) -> None:
    context = context_for(tmp_path, input={"dtype": "float32", "shape": [3, -1]})
    example = TensorHandler().example_input(context)
    assert example.shape == (1, 3, tensor_spec.EXAMPLE_DIMENSION)
    assert torch.equal(example, TensorHandler().example_input(context))
    whole = context_for(tmp_path, input={"dtype": "int64", "shape": [2]})
    assert torch.equal(TensorHandler().example_input(whole), torch.ones(1, 2, dtype=torch.int64))


def test_describe_and_explain_requests_are_told_apart(handler: TensorHandler) -> None:
    assert handler.context is not None
    context = handler.context
    assert handler.handle([{}], batch_of(context, {"describe": "True"})) == [None]
    with pytest.raises(PredictionException) as caught:
        handler.handle([{"body": NUMBERS}], batch_of(context, {"explain": "True"}))
    assert caught.value.error_code == 501
    handler.get_insights = lambda tensor_data, raw_data, target=0: [target]  # type: ignore[method-assign]
    row = {"data": NUMBERS, "target": "2"}
    assert handler.handle([row], batch_of(context, {"explain": "True"})) == [2]
    assert handler.handle([{"body": NUMBERS}], batch_of(context, {"explain": "False"}))[0] == NUMBER_BYTES


def test_small_bodies_are_quick(handler: TensorHandler) -> None:
    assert handler.is_quick(64)
    assert not handler.is_quick(1 << 20)
