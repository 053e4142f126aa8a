"""Requests of the Open Inference Protocol for the handler ``tensor`` in worker processes.

The worker sees rows as callers of ``/predictions`` would send them, that is without the datatype and shape that the
protocol tells. So both are compared with the model's description here, or other numbers of as many bytes would do.
"""

from __future__ import annotations

import json

import torch

from pyserve.api.kserve_requests import (
    JSON,
    RAW,
    AskedRowsPending,
    element_rows,
    tensors_for,
)
from pyserve.api.open_inference import InferOutput, InferRequest
from pyserve.api.open_inference_json import outputs_of_answers
from pyserve.api.transport import Transport
from pyserve.handlers.shared_sizes import check_shared
from pyserve.handlers.tensor_spec import TensorSpec
from pyserve.lanes.lane import Lane
from pyserve.lanes.row_requests import ROW_COUNT_MAX
from pyserve.request.datatypes import BYTES
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Headers, Request, Response


class TensorRowsPending(AskedRowsPending):
    """Rows of numbers for a handler that takes numbers.

    Args:
        specs: of its inputs, in order.
        output_names: of the model's outputs, if model-config.yaml gives them.
    """

    __slots__ = ("_request", "_specs", "_transport", "output_names")

    def __init__(
        self, lane: Lane, exchange: Exchange, version: str, url_version: str, *, transport: Transport,
        specs: list[TensorSpec], output_names: tuple[str, ...], headers: Headers,
    ):  # fmt: skip
        super().__init__(
            lane, exchange, version, url_version, headers=headers, is_read_quick=transport.is_read_quick
        )  # fmt: skip
        self._transport = transport
        self._request = InferRequest([])
        self._specs = specs
        self.output_names = output_names

    def read(self) -> int:
        self._request = request = self._transport.read()
        if len(request.inputs) == 1 and request.inputs[0].datatype == BYTES:
            # An element holds a row's bytes, as a body of /predictions does.
            self.rows_to_ask = element_rows(request.inputs[0])
            return len(self.rows_to_ask)
        tensors = tensors_for(request.inputs, self._specs)
        count = len(tensors[0])
        if count <= ROW_COUNT_MAX:  # else refused as too many
            check_shared(self._specs, tensors)
            self.rows_to_ask = [self._row([tensor[index] for tensor in tensors]) for index in range(count)]
        return count

    def _row(self, tensors: list[torch.Tensor]) -> tuple[bytearray, str]:
        free = sum(spec.shape.count(-1) for spec in self._specs)
        if free == 0 or (free == 1 and len(self._specs) == 1):
            return bytearray(b"".join(InferOutput("", tensor.clone()).raw() for tensor in tensors)), RAW
        # Bytes would not tell the sizes; numbers come through JSON as they are.
        values = [tensor.tolist() for tensor in tensors]
        one = dict(zip([spec.name for spec in self._specs], values, strict=True)) if len(values) > 1 else values[0]
        return bytearray(json.dumps(one).encode()), JSON

    def row_request(self, body: bytearray, content_type: str, accept: str = RAW) -> Request:
        # Answers in JSON would not tell the datatype.
        return super().row_request(body, content_type, accept)

    def make_answer(self) -> Response:
        outputs = outputs_of_answers(self.answers, self.output_names)
        return self._transport.answer(self, self._request, outputs)
