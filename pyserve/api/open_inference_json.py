"""The Open Inference Protocol's tensors in JSON, as handlers read and answer them.

* A request as an archive's own handler reads it, and the outputs in what it answers: the protocol's JSON.
* Outputs made of what a built-in handler answered, row by row, which is not of the protocol.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import torch

from pyserve.api.open_inference import (
    InferInput,
    InferOutput,
    InferRequest,
    check_input,
    elements_of,
    flat_values,
    tensor_of,
)
from pyserve.errors import HandlerError, InputError
from pyserve.json_array import JsonArray
from pyserve.request.datatypes import BYTES, DATATYPES
from pyserve.request.json_body import load
from pyserve.request.json_pieces import dump_in_slices
from pyserve.request.messages import Response
from pyserve.tensor_lists import to_lists


def request_as_json(request: InferRequest, model_name: str, *, as_base64: bool) -> bytes:
    """The request as a handler of its own reads it: all data as JSON, flat.

    Args:
        as_base64: whether BYTES become base64 even if they are text, as TorchServe's gRPC has it. Else all of an input
            do if one is no text, and its parameter ``content_type`` is ``base64``.
    """
    inputs = []
    for tensor in request.inputs:
        said: dict[str, str] = {}
        if tensor.datatype == BYTES:
            values, is_base64 = _texts(elements_of(tensor), as_base64=as_base64)
            said = {"content_type": "base64"} if is_base64 and not as_base64 else said
        elif isinstance(tensor.data, (list, JsonArray)):
            values = flat_values(tensor)
        else:
            values = to_lists(tensor_of(tensor).reshape(-1))
        entry = {"name": tensor.name, "shape": list(tensor.shape), "datatype": tensor.datatype, "data": values}
        rest = {name: value for name, value in tensor.parameters.items() if name != "binary_data_size"} | said
        inputs.append({**entry, **({"parameters": rest} if rest else {})})
    whole: dict[str, Any] = {"id": request.id} if request.id else {}
    whole |= {"model_name": model_name, "inputs": inputs}
    if request.parameters:
        whole["parameters"] = dict(request.parameters)
    if request.outputs:
        whole["outputs"] = [{"name": output.name} for output in request.outputs]
    return dump_in_slices(whole, _plain)


def _plain(value: Any) -> bytes:
    return json.dumps(value).encode()


def _texts(elements: list[Any], *, as_base64: bool) -> tuple[list[str], bool]:
    if not as_base64:
        try:
            return [each if isinstance(each, str) else bytes(each).decode() for each in elements], False
        except UnicodeDecodeError:
            pass
    raws = [each.encode("utf-8", "surrogatepass") if isinstance(each, str) else bytes(each) for each in elements]
    return [base64.b64encode(raw).decode() for raw in raws], True


def outputs_in_json(body: bytes | bytearray | memoryview) -> list[InferOutput] | None:
    """The outputs that a handler answered in the protocol's JSON; None if the answer is something else."""
    try:
        told = load(body)
        entries = told["outputs"]
        return [_output_in_json(entry) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError, InputError, RecursionError):
        return None


def _output_in_json(entry: dict[str, Any]) -> InferOutput:
    name, datatype, shape, data = str(entry["name"]), entry["datatype"], entry["shape"], entry["data"]
    if datatype not in DATATYPES or not isinstance(data, list):
        raise ValueError(f"output {name} is not of the protocol")
    if datatype == BYTES:
        texts = [each if isinstance(each, str) else json.dumps(each) for each in data]
        return InferOutput(name, [each.encode() for each in texts])
    tensor = InferInput(name, datatype, tuple(shape), data)
    check_input(tensor)
    return InferOutput(name, tensor_of(tensor))


def outputs_of_answers(answers: list[Response], configured: tuple[str, ...] = ()) -> list[InferOutput]:
    """A handler's answers, one per row, as outputs: tensors if they are numbers of one shape, else BYTES.

    Args:
        configured: names of outputs that come without.

    Raises:
        HandlerError: tensors of several shapes, which do not make one.
    """
    headers = answers[0].headers
    if all("x-tensor-dtype" in answer.headers for answer in answers):
        if any(answer.headers != headers for answer in answers):
            shapes = " and ".join(sorted({f"[{answer.headers['x-tensor-shape']}]" for answer in answers})[:2])
            raise HandlerError(
                f"the rows of one request have outputs of different shapes, {shapes}; send such rows one by one"
            )
        return _outputs_of_raw(answers, configured)
    values = []
    for answer in answers:
        try:
            values.append(load(answer.body))
        except ValueError:
            break
    if len(values) == len(answers) and isinstance(values[0], (int, float, list)):
        try:
            tensor = torch.tensor(values)
            if tensor.is_floating_point():
                tensor = torch.tensor(values, dtype=torch.float64)  # as exact as the handler's answer
        except (ValueError, TypeError, RuntimeError, OverflowError):
            pass  # of different shapes, or with something else in them
        else:
            return [InferOutput("output0", tensor)]
    return [InferOutput("output0", [bytes(answer.body) for answer in answers])]


def _outputs_of_raw(answers: list[Response], configured: tuple[str, ...]) -> list[InferOutput]:
    headers = answers[0].headers
    dtypes = [getattr(torch, name) for name in headers["x-tensor-dtype"].split(",")]
    shapes = [[int(size) for size in shape.split(",") if size] for shape in headers["x-tensor-shape"].split(";")]
    names = tuple(name for name in headers.get("x-tensor-name", "").split(",") if name)
    sizes = [dtype.itemsize * torch.Size(shape).numel() for dtype, shape in zip(dtypes, shapes, strict=True)]
    outputs, at = [], 0
    for index, name in enumerate(_names_of_outputs(len(dtypes), names or configured)):
        column = bytearray(b"".join(bytes(answer.body[at : at + sizes[index]]) for answer in answers))
        at += sizes[index]
        tensor = torch.frombuffer(column, dtype=dtypes[index]).view(len(answers), *shapes[index])
        outputs.append(InferOutput(name, tensor))
    return outputs


def _names_of_outputs(count: int, configured: tuple[str, ...]) -> tuple[str, ...]:
    """Those that model-config.yaml gives, if they are as many, else ``output0``, ``output1``, ..."""
    return configured if len(configured) == count else tuple(f"output{index}" for index in range(count))
