"""KServe's protocols spoken for models that do not know them: requests whose rows a lane takes one by one.

* `TensorsPending`: tensors go into the network as they are, and its outputs come back as they are.
* `tensor_rows.TensorRowsPending`: the same for a handler in worker processes, whose rows go there as numbers.
* `HandlerRowsPending`: each row is a request to the handler, as a caller of ``/predictions`` would make it.
* `OwnHandlerPending`: the whole is one request, in JSON, to a handler that knows the protocol itself.

The last three, and version 1 of the protocol, ask the handler: `AskedRowsPending`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from pyserve.api.open_inference import (
    TEXT_SHOWN_MAX,
    InferInput,
    InferOutput,
    InferRequest,
    element_count,
    elements_of,
    quoted,
    tensor_of,
)
from pyserve.api.open_inference_json import outputs_in_json, outputs_of_answers, request_as_json
from pyserve.api.transport import Transport
from pyserve.errors import HandlerError, InputError
from pyserve.handlers.shared_sizes import filled_up
from pyserve.handlers.tensor_spec import TensorSpec, is_allowed
from pyserve.input_config import range_text
from pyserve.lanes.lane import Lane
from pyserve.lanes.row_requests import ROW_COUNT_MAX, RowPending, RowsPending
from pyserve.lanes.sequences import SequenceLane
from pyserve.request.datatypes import BYTES, datatype_of
from pyserve.request.exchange import Exchange
from pyserve.request.json_pieces import dump_in_slices
from pyserve.request.messages import Headers, Request, Response
from pyserve.tensor_lists import to_lists

JSON = "application/json"
RAW = "application/octet-stream"
# Bodies of rows that are made on the loop.
QUICK_SIZE_MAX = 4096
# What a row's own request must not have of the whole's: it says what the whole's body is.
_OF_THE_BODY = ("content-type", "content-length", "accept", "inference-header-content-length")


class TensorsPending(RowsPending):
    """Inputs that are the network's own.

    Args:
        specs: of the network's inputs, in order.
        output_names: of its outputs, in order; empty if the network names them itself or nobody does.
    """

    __slots__ = ("_outputs", "_request", "_specs", "_transport", "inputs", "output_names")
    wants_tensors = True

    def __init__(
        self, lane: Lane, exchange: Exchange, version: str, url_version: str, *, transport: Transport,
        specs: list[TensorSpec], output_names: tuple[str, ...],
    ):  # fmt: skip
        super().__init__(lane, exchange, version, url_version)
        self._transport = transport
        self._request = InferRequest([])
        self._specs = specs
        self.output_names = output_names
        self.inputs: list[torch.Tensor] = []  # [rows, ...] each
        self._outputs: list[InferOutput] = []

    @property
    def is_quick(self) -> bool:
        return self._transport.is_read_quick

    def read(self) -> int:
        self._request = request = self._transport.read()
        tensors = tensors_for(request.inputs, self._specs, is_for_engine=True)
        self.inputs = filled_up(self._specs, tensors)
        return len(tensors[0])

    def row(self, index: int) -> RowPending:
        inputs = [column[index : index + 1] for column in self.inputs]
        return RowPending(self, index, self.exchange.request, inputs, wants_tensors=True)

    def take_tensors(self, first: int, outputs: list[torch.Tensor], names: tuple[str, ...]) -> None:
        count = len(outputs[0])
        if count == self.row_count:
            self._name_outputs(outputs, names)
            return
        if not self._outputs:
            whole = [torch.empty((self.row_count, *each.shape[1:]), dtype=each.dtype) for each in outputs]
            self._name_outputs(whole, names)
        elif tuple(output.name for output in self._outputs) != names:
            raise HandlerError("an output is None for some rows of the request and not for all; send them one by one")
        for kept, output in zip(self._outputs, outputs, strict=True):
            assert isinstance(kept.data, torch.Tensor)
            if kept.data.shape[1:] != output.shape[1:] or kept.data.dtype != output.dtype:
                raise HandlerError(
                    f"the rows of one request have outputs {kept.name!r} of different shapes, "
                    f"{list(kept.data.shape[1:])} and {list(output.shape[1:])}; send such rows one by one"
                )
            kept.data[first : first + count] = output

    def _name_outputs(self, outputs: list[torch.Tensor], names: tuple[str, ...]) -> None:
        self._outputs = [InferOutput(name, output) for name, output in zip(names, outputs, strict=True)]
        for output in self._outputs:
            try:
                datatype_of(output.data.dtype)  # type: ignore[union-attr]
            except KeyError:
                raise HandlerError(
                    f"output {output.name!r} is {output.data.dtype}, for which the protocol has no datatype"  # type: ignore[union-attr]
                ) from None

    @property
    def is_answer_quick(self) -> bool:
        return self._transport.is_encode_quick(self._request, self._outputs)

    def make_answer(self) -> Response:
        return self._transport.answer(self, self._request, self._outputs)


class AskedRowsPending(RowsPending):
    """Rows that are requests to the handler, each with a body of its own; `read` and `make_answer` are the protocol's.

    Args:
        headers: what the server adds to rows for the handler.
        is_read_quick: whether `read` takes under 50 us, apart from making bodies of rows.

    Attributes:
        rows_to_ask: body and content type of each; set by `read`.
    """

    __slots__ = ("_answers", "_headers", "_is_read_quick", "rows_to_ask")

    def __init__(
        self, lane: Lane, exchange: Exchange, version: str, url_version: str, *, headers: Headers,
        is_read_quick: bool = True,
    ):  # fmt: skip
        super().__init__(lane, exchange, version, url_version)
        self._headers = headers
        self._is_read_quick = is_read_quick
        self.rows_to_ask: list[tuple[bytearray, str]] = []
        self._answers: dict[int, Response] = {}

    @property
    def is_quick(self) -> bool:
        return self._is_read_quick and len(self.exchange.request.body) <= QUICK_SIZE_MAX

    def row(self, index: int) -> RowPending:
        return RowPending(self, index, self.row_request(*self.rows_to_ask[index]), None)

    def row_request(self, body: bytearray, content_type: str, accept: str = "") -> Request:
        """A row's own request, as a client of ``/predictions`` would make it."""
        whole = self.exchange.request
        headers = [pair for pair in whole.headers if pair[0].lower() not in _OF_THE_BODY]
        if content_type:
            headers.append(("Content-Type", content_type))
        if accept:
            headers.append(("Accept", accept))
        request = Request(
            "POST", whole.path, headers=headers + self._headers, body=body, client=whole.client, id=whole.id,
            arrived_at=whole.arrived_at, has_timing=whole.has_timing,
        )  # fmt: skip
        request.deadline = whole.deadline
        return request

    def take_answer(self, index: int, response: Response) -> None:
        self._answers[index] = response

    @property
    def is_answer_quick(self) -> bool:
        return sum(len(answer.body) for answer in self._answers.values()) <= QUICK_SIZE_MAX

    @property
    def answers(self) -> list[Response]:
        """Of all rows, in their order."""
        return [self._answers[index] for index in range(self.row_count)]


class HandlerRowsPending(AskedRowsPending):
    """Rows for a built-in handler that makes its own input of them.

    Args:
        pixels: what the network takes where tensors may come too, in place of what the handler makes its input of.
    """

    __slots__ = ("_pixels", "_request", "_tensor", "_transport")

    def __init__(
        self, lane: Lane, exchange: Exchange, version: str, url_version: str, *, transport: Transport,
        headers: Headers, pixels: TensorSpec | None = None,
    ):  # fmt: skip
        super().__init__(
            lane, exchange, version, url_version, headers=headers, is_read_quick=transport.is_read_quick
        )  # fmt: skip
        self._transport = transport
        self._request = InferRequest([])
        self._pixels = pixels
        self._tensor: torch.Tensor | None = None  # in place of `rows_to_ask`

    def read(self) -> int:
        self._request = request = self._transport.read()
        if len(request.inputs) != 1:
            names = ", ".join(repr(tensor.name) for tensor in request.inputs)[:TEXT_SHOWN_MAX]
            raise InputError(f"the model takes one input, each row an item for its handler; got {names}")
        (tensor,) = request.inputs
        count = tensor.shape[0]
        if count > ROW_COUNT_MAX:
            return count  # refused as too many
        if tensor.datatype == BYTES:
            self.rows_to_ask = element_rows(tensor)
        elif self._pixels is not None:
            (self._tensor,) = tensors_for([tensor], [self._pixels])
        else:
            self.rows_to_ask = [(bytearray(_as_json(row)), JSON) for row in tensor_of(tensor)]
        return count

    def row(self, index: int) -> RowPending:
        if self._tensor is not None:
            return RowPending(self, index, self.row_request(bytearray(), ""), [self._tensor[index : index + 1]])
        return super().row(index)

    def make_answer(self) -> Response:
        return self._transport.answer(self, self._request, outputs_of_answers(self.answers))


class OwnHandlerPending(AskedRowsPending):
    """One request to a handler that reads the protocol's JSON, or its envelope does."""

    __slots__ = ("_id_key", "_request", "_transport")

    def __init__(
        self, lane: Lane, exchange: Exchange, version: str, url_version: str, *, transport: Transport, headers: Headers
    ):
        super().__init__(
            lane, exchange, version, url_version, headers=headers, is_read_quick=transport.is_read_quick
        )  # fmt: skip
        self._transport = transport
        self._request = InferRequest([])
        # The header that names a request's sequence. By the time the request is read, its lane is that of one worker.
        self._id_key = lane.spec.header_keys[0] if isinstance(lane, SequenceLane) else ""

    def read(self) -> int:
        self._request = self._transport.read()
        if self._id_key:
            self._check_sequence(self._id_key)
        body = request_as_json(self._request, self.lane.name, as_base64=self._transport.bytes_as_base64)
        self.rows_to_ask = [(bytearray(body), JSON)]
        return 1

    def _check_sequence(self, id_key: str) -> None:
        """That it is of the sequence that its parameters name; by its headers it has found its worker."""
        told = sequence_id(self._request.parameters)
        if told and told != self.exchange.request.header(id_key):
            raise InputError(f"the parameter 'sequence_id' is {quoted(told)}; over HTTP send it as the header {id_key}")

    def make_answer(self) -> Response:
        (answer,) = self.answers
        outputs = outputs_in_json(answer.body)
        if outputs is None:
            if self._transport.passes_others:
                return answer
            outputs = [InferOutput("output0", [bytes(answer.body)])]
        return self._transport.answer(self, self._request, outputs)


def sequence_id(parameters: Mapping[str, Any]) -> str:
    """The sequence that Triton's clients name in a request's parameters; ``""`` for none."""
    id = parameters.get("sequence_id")
    return "" if id in (None, 0, "") else str(id)


def names_of_inputs(specs: list[TensorSpec]) -> list[str]:
    """As model-config.yaml gives them, else ``input0``."""
    return [spec.name or f"input{index}" for index, spec in enumerate(specs)]


def tensors_for(
    inputs: list[InferInput], specs: list[TensorSpec], *, is_for_engine: bool = False
) -> list[torch.Tensor]:
    """The inputs in the network's order, each [rows, ...], as they came: nothing is padded.

    Args:
        is_for_engine: they go into a batch of the engine, which takes numbers from any address.

    Raises:
        InputError: they are not those that ``specs`` describe; the text names the input, what came and what may.
    """
    ordered = _in_order(inputs, specs)
    for tensor, spec in zip(ordered, specs, strict=True):
        _check_fits(tensor, spec)
    if len({tensor.shape[0] for tensor in ordered}) > 1:
        raise InputError(f"the inputs have different numbers of rows: {', '.join(map(str, ordered))}")
    tensors = []
    for tensor, spec in zip(ordered, specs, strict=True):
        is_looked_at = spec.pad_to or spec.has_to_be_read
        tensors.append(tensor_of(tensor, is_for_engine=is_for_engine and not is_looked_at))
        spec.check(tensors[-1])
    return tensors


def _in_order(inputs: list[InferInput], specs: list[TensorSpec]) -> list[InferInput]:
    """``inputs`` as the network takes them. A lone input without a configured name may have any."""
    if len(specs) == 1 and len(inputs) == 1 and not specs[0].name:
        return inputs
    names = names_of_inputs(specs)
    given = {tensor.name: tensor for tensor in inputs}
    if len(given) < len(inputs):
        raise InputError("two inputs have the same name")
    if set(given) != set(names):
        told = ", ".join(map(repr, given))[:TEXT_SHOWN_MAX] or "none"
        raise InputError(f"the model's inputs are {', '.join(map(repr, names))}; got {told}")
    return [given[name] for name in names]


def _check_fits(tensor: InferInput, spec: TensorSpec) -> None:
    wanted = datatype_of(spec.torch_dtype)
    if tensor.datatype != wanted:
        raise InputError(f"{tensor} must be {wanted}, as the model's input is {spec}")
    sizes = tensor.shape[1:]
    if len(sizes) != len(spec.sizes) or not all(map(is_allowed, sizes, spec.sizes)):
        shape = ", ".join(["rows", *map(range_text, spec.sizes)])
        raise InputError(f"{tensor} must have the shape [{shape}]")


def _as_json(row: torch.Tensor) -> bytes:
    value = to_lists(row) if row.dim() else row.item()
    return dump_in_slices(value, lambda each: json.dumps(each).encode())


def element_rows(tensor: InferInput) -> list[tuple[bytearray, str]]:
    """Body and content type of a row for each element of a BYTES input. InputError if there is not one per row."""
    count = tensor.shape[0]
    if element_count(tensor) != count:
        raise InputError(f"{tensor} needs one element per row, that is the shape [{count}] or [{count}, 1]")
    return [_element_row(element) for element in elements_of(tensor)]


def _element_row(element: Any) -> tuple[bytearray, str]:
    if isinstance(element, str):
        return bytearray(element.encode("utf-8", "surrogatepass")), "text/plain; charset=utf-8"
    return bytearray(element), ""
