"""Outputs of any nesting: their names and their nesting as JSON, flat with dotted names as bytes, nothing dropped."""

from __future__ import annotations

import dataclasses
import struct
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from pyserve.handler import HandlerError, InputError
from pyserve.handlers.outputs import named_outputs
from pyserve.handlers.tensor import JSON, RAW, TensorHandler
from tests.support.contexts import batch_of, context_for


class Scores(NamedTuple):
    logits: torch.Tensor
    state: Any = None


@dataclasses.dataclass
class Found:
    boxes: torch.Tensor
    count: int


X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
Y = torch.tensor([5, 6])


def answers_of(output: Any, /, *accept: str, **config: Any) -> tuple[list[Any], Any]:
    """The handler's answers to items that want these kinds, and the batch's context."""
    handler = TensorHandler()
    handler.prepare(context_for("/nowhere", input={"shape": [2]}, **config))
    assert handler.context is not None
    handler.context = batch = batch_of(handler.context, *({"Accept": each} for each in accept))
    return handler.postprocess(output), batch


@pytest.mark.parametrize(
    ("output", "first", "second"),
    [
        ((X, None), [[1.0, 2.0], None], [[3.0, 4.0], None]),
        ((X, (Y, [X, None])), [[1.0, 2.0], [5, [[1.0, 2.0], None]]], [[3.0, 4.0], [6, [[3.0, 4.0], None]]]),
        ({"a": {"b": X, "c": None}, "d": Y}, {"a": {"b": [1.0, 2.0], "c": None}, "d": 5},
         {"a": {"b": [3.0, 4.0], "c": None}, "d": 6}),
        (OrderedDict(z=Y, a=X), {"z": 5, "a": [1.0, 2.0]}, {"z": 6, "a": [3.0, 4.0]}),
        (Scores(X), {"logits": [1.0, 2.0], "state": None}, {"logits": [3.0, 4.0], "state": None}),
        (Scores(X, (Y,)), {"logits": [1.0, 2.0], "state": [5]}, {"logits": [3.0, 4.0], "state": [6]}),
        (Found(X, 7), {"boxes": [1.0, 2.0], "count": 7}, {"boxes": [3.0, 4.0], "count": 7}),
        (SimpleNamespace(y=Y), {"y": 5}, {"y": 6}),
        ((X, 3, 0.5, True, "ok"), [[1.0, 2.0], 3, 0.5, True, "ok"], [[3.0, 4.0], 3, 0.5, True, "ok"]),
        ((Y, float("nan"), np.float32(0.5), Y.numpy()), [5, None, 0.5, 5], [6, None, 0.5, 6]),
        ((Y, (), {}), [5, [], {}], [6, [], {}]),
        ({"n": {1: Y}}, {"n": {"1": 5}}, {"n": {"1": 6}}),
        ([X], [[1.0, 2.0]], [[3.0, 4.0]]),
    ],
)  # fmt: skip
def test_json_keeps_names_and_nesting_and_cuts_tensors_into_rows(output: Any, first: Any, second: Any) -> None:
    answers, batch = answers_of(output, JSON, JSON)
    assert answers == [first, second]
    assert [type(each) for each in answers] == [type(first), type(second)]
    assert batch.get_response_content_type(1) == JSON


def test_raw_answers_are_flat_with_dotted_names() -> None:
    (first, second), batch = answers_of({"a": {"b": X}, "c": (Y, X)}, RAW, RAW)
    assert (first, second) == (struct.pack("<2fq2f", 1, 2, 5, 1, 2), struct.pack("<2fq2f", 3, 4, 6, 3, 4))
    assert batch.get_response_headers(1) == {
        "content-type": RAW, "x-tensor-dtype": "float32,int64,float32", "x-tensor-shape": "2;;2",
        "x-tensor-name": "a.b,c.0,c.1",
    }  # fmt: skip
    _, batch = answers_of((X, (Y, Y)), RAW, RAW)
    assert batch.get_response_headers(0)["x-tensor-name"] == "output0,output1.0,output1.1"
    _, batch = answers_of((X, (Y, Y)), RAW, RAW, output=["scores", "pair"])
    assert batch.get_response_headers(0)["x-tensor-name"] == "scores,pair.0,pair.1"
    _, batch = answers_of((X, Y), RAW, RAW)
    assert "x-tensor-name" not in batch.get_response_headers(0)


def test_numbers_are_tensors_in_a_raw_answer() -> None:
    answers, batch = answers_of((Y, 3, True, 0.5), RAW, RAW)
    assert answers == [struct.pack("<qq?d", 5, 3, True, 0.5), struct.pack("<qq?d", 6, 3, True, 0.5)]
    headers = batch.get_response_headers(0)
    assert (headers["x-tensor-dtype"], headers["x-tensor-shape"]) == ("int64,int64,bool,float64", ";;;")


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ({"x": X, "state": None}, "output 'state' is None"),
        ((X, (Y, "text")), "output 'output1.1' is a text"),
        ((X, 2**70), "output 'output1' is a number beyond 64 bits"),
    ],
)
def test_what_has_no_raw_bytes_is_refused_for_those_who_ask_for_them(output: Any, told: str) -> None:
    (raw, json), batch = answers_of(output, RAW, JSON)
    assert (raw["code"], raw["type"]) == (400, "BadRequestException")
    assert raw["message"].startswith(told) and "'Accept: application/json'" in raw["message"]
    assert (batch.get_response_status(0), batch.get_response_status(1)) == ((400, ""), (200, None))
    # What the message advises works.
    assert answers_of(output, JSON, JSON)[0][1] == json


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ((X, torch.tensor(1.0)), "output '1' is a tensor of no dimensions, one number for the whole batch"),
        ({"a": {"b": X, "c": torch.zeros(3, 1)}}, "but output 'a.b' has 2, output 'a.c' has 3"),
        ((None, 3), "no tensor at all"),
        ({}, "no tensor at all"),
        ((X, {1, 2}), "output '1' of the model is a set, not a tensor, None, a number"),
        (object(), "the only output of the model is a object, not"),
        ({"x": np.array(["a", "b"])}, "output 'x' is an array of <U1"),
    ],
)
def test_output_of_which_no_items_part_can_be_told_is_the_models_fault(output: Any, says: str) -> None:
    with pytest.raises(HandlerError, match=says):
        answers_of(output, JSON, JSON)


def test_output_nested_in_itself_is_refused() -> None:
    output: list[Any] = [X]
    output.append(output)
    with pytest.raises(HandlerError, match="nested more than 32 levels"):
        answers_of(output, JSON)


def test_an_output_for_another_number_of_items_is_refused() -> None:
    with pytest.raises(HandlerError, match="has 2 entries for 3 items"):
        answers_of((X, Y), JSON, RAW, JSON)


# --- the Open Inference Protocol's names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "configured", "names"),
    [
        (X, (), ["output0"]), (X, ("scores",), ["scores"]), (X, ("a", "b"), ["output0"]),
        ((X, Y), (), ["output0", "output1"]), ((X, Y), ("a", "b"), ["a", "b"]),
        ((X, (Y, X)), (), ["output0", "output1.0", "output1.1"]), ((X, (Y, X)), ("a", "b"), ["a", "b.0", "b.1"]),
        ((X, (Y, X)), ("a", "b", "c"), ["a", "b", "c"]),
        # What is None has its name too, so that the others keep theirs.
        ((X, None, Y), (), ["output0", "output2"]), ((None, X), ("a", "b"), ["b"]),
        ({"x": X, "y": {"z": Y}}, ("a", "b"), ["x", "y.z"]),
        (Scores(X, (Y,)), (), ["logits", "state.0"]),
        ((X, 3), (), ["output0", "output1"]),
    ],
)  # fmt: skip
def test_outputs_have_names(output: Any, configured: tuple[str, ...], names: list[str]) -> None:
    tensors, found = named_outputs(output, configured)
    assert list(found) == names
    assert all(len(tensor) == 2 for tensor in tensors) and len(tensors) == len(names)


def test_two_outputs_of_one_name_are_refused() -> None:
    with pytest.raises(HandlerError, match=r"two outputs of the model would be called 'a\.b'"):
        named_outputs({"a": {"b": X}, "a.b": Y})


def test_a_text_is_no_tensor() -> None:
    with pytest.raises(InputError, match=r"output 'output1' is a text.*Accept: application/json"):
        named_outputs((X, "text"))


def test_the_memory_of_an_output_may_be_strided() -> None:
    output = {"t": torch.arange(8.0).view(4, 2).t()}
    assert answers_of(output, RAW, JSON)[0] == [struct.pack("<4f", 0, 2, 4, 6), {"t": [1.0, 3.0, 5.0, 7.0]}]
