"""The Open Inference Protocol, version 2, with JSON tensors."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np

from pyserve.handler import InputError
from ts.torch_handler.request_envelope.base import BaseEnvelope, body_of

logger = logging.getLogger(__name__)

_DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip


class KServev2Envelope(BaseEnvelope):
    """``inputs`` in, ``outputs`` out, request by request."""

    def handle(self, data: Any, context: Any) -> Any:
        """Each request of a batch on its own: its inputs are the handler's batch."""
        self.context = context
        if data is None or self._describes():
            return self._handle_fn(data, context)
        answers = []
        for index, row in enumerate(data):
            self._index = index
            answers += self.format_output(self._handle_fn(self.parse_input([row]), context))
        return answers

    def parse_input(self, data: Any) -> list[Any]:
        """The inputs of the first request, ``data`` of each as a text (BYTES) or as nested lists of its shape.

        Raises:
            InputError: it is not of that form.
        """
        value = body_of(data[0])
        if isinstance(value, (bytes, bytearray)):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise InputError(f"the body is not JSON: {error}") from error
        if not isinstance(value, dict) or not isinstance(value.get("inputs"), list):
            raise InputError('the request needs {"inputs": [{"name", "shape", "datatype", "data"}]}')
        self._id = value.get("id")
        self._names = []
        rows = []
        for tensor in value["inputs"]:
            try:
                self._names.append(tensor["name"])
                if tensor["datatype"] == "BYTES":
                    value = tensor["data"][0]
                else:
                    value = np.array(tensor["data"]).reshape(tensor["shape"]).tolist()
                rows.append({**tensor, "data": value})
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise InputError(f"an input tensor cannot be read: {type(error).__name__}: {error}") from error
        return rows

    def format_output(self, data: Any) -> list[Any]:
        """One object with an output per input."""
        outputs = []
        for name, answer in zip(self._names, data, strict=False):
            flat = np.asarray(answer).reshape(-1)
            datatype = _DATATYPES.get(str(flat.dtype), "BYTES")
            outputs.append({"name": name, "datatype": datatype, "data": flat.tolist(), "shape": flat.shape})
        context = self.context
        index = getattr(self, "_index", 0)
        manifest = (context.manifest or {}).get("model", {})
        return [
            {
                "id": self._id if self._id is not None else context.get_request_id(index),
                "model_name": manifest.get("modelName", context.model_name),
                "model_version": manifest.get("modelVersion", "1.0"),
                "outputs": outputs,
            }
        ]
