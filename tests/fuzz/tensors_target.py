"""Requests of the Open Inference Protocol: the text of Inference-Header-Content-Length, a line feed, and the body.

What is read is encoded again, in both forms, and must be the same then.
"""

from __future__ import annotations

import json

import torch

from pyserve.api.open_inference import InferOutput, InferRequest, InferResponse, element_count, elements_of, tensor_of
from pyserve.api.open_inference_json import outputs_in_json, request_as_json
from pyserve.api.open_inference_rest import JSON_SIZE_HEADER, RestTransport, is_infer_request
from pyserve.errors import HandlerError, InputError
from pyserve.request.datatypes import BYTES
from pyserve.request.messages import Request

SIZE_MAX = 1 << 20
# Of one input, beyond which this target makes no tensor: a shape of sizes without data may be any.
_COUNT_MAX = 1 << 16


def check(data: bytes) -> None:
    told, _, body = data.partition(b"\n")
    headers = [(JSON_SIZE_HEADER, told.decode("latin-1"))] if told else []
    request = Request("POST", "/v2/models/m/infer", headers=headers, body=bytearray(body))
    is_infer_request(request)
    transport = RestTransport(request, SIZE_MAX)
    assert isinstance(transport.is_read_quick, bool)
    try:
        read = transport.read()
        outputs = _outputs(read)
        for as_base64 in (False, True):
            json.loads(request_as_json(read, "m", as_base64=as_base64))
    except InputError as error:
        _check_text(error.message)
        return
    transport.is_encode_quick(read, outputs)
    response = InferResponse("m", "1.0", outputs, read.id)
    try:
        answer = transport.encode(read, response)
        assert len(answer.body) + sum(map(len, answer.tail)) <= SIZE_MAX
        _check_round_trip(outputs)
        if not answer.tail:
            outputs_in_json(answer.body)
    except (InputError, HandlerError) as error:
        _check_text(error.message)


def _outputs(read: InferRequest) -> list[InferOutput]:
    outputs = []
    for tensor in read.inputs:
        if tensor.datatype == BYTES:
            elements = [
                each.encode("utf-8", "surrogatepass") if isinstance(each, str) else bytes(each)
                for each in elements_of(tensor)
            ]
            assert len(elements) == element_count(tensor)
            outputs.append(InferOutput(tensor.name, elements))
        elif element_count(tensor) <= _COUNT_MAX:
            found = tensor_of(tensor)
            assert found.shape == torch.Size(tensor.shape)
            outputs.append(InferOutput(tensor.name, found))
    return outputs


def _check_round_trip(outputs: list[InferOutput]) -> None:
    """Binary outputs sent back as inputs are the same bits."""
    entries = [
        {"name": output.name, "datatype": output.datatype, "shape": output.shape,
         "parameters": {"binary_data_size": len(output.raw())}}
        for output in outputs
    ]  # fmt: skip
    if not entries or any(not output.name or not output.shape for output in outputs):
        return
    head = json.dumps({"inputs": entries}).encode()
    body = bytearray(head + b"".join(bytes(output.raw()) for output in outputs))
    request = Request("POST", "/v2/models/m/infer", headers=[(JSON_SIZE_HEADER, str(len(head)))], body=body)
    for output, again in zip(outputs, _outputs(RestTransport(request, SIZE_MAX).read()), strict=True):
        assert bytes(again.raw()) == bytes(output.raw()), "other bits after a round trip"
        assert again.datatype == output.datatype


def _check_text(text: str) -> None:
    assert len(text) < 2000, f"a text of {len(text)} characters"
