"""Tensors in, tensors out: JSON nested lists, raw little-endian bytes, or arrays as numpy.save writes them.

Bytes of both kinds may also come as base64 text: ``{"data": "AACAPw=="}``, or under an input's name.

model-config.yaml says what one item is: ``input: {dtype: float32, shape: [1, 8, 8]}``, the shape without the batch
dimension, -1 for any size, ``2..64`` for a range; ``vocabulary`` or ``values`` say which numbers may come
(`pyserve.input_config` has all of it). What is said there is checked before the model runs. With
``pad_to: [32, 64, 128]`` a free dimension is filled up with ``pad_value`` (0) to the next of these sizes, so that items
of similar length share batches; the model must know what to leave out.

Answers come in kind (raw to raw, JSON to JSON and forms) unless ``Accept`` asks
for ``application/octet-stream`` or ``application/json``. A raw answer has the headers ``x-tensor-dtype``
(``float32``) and ``x-tensor-shape`` (``10``, ``3,224,224``; empty for a single number). A model with several
outputs answers with their bytes one after the other, dtypes separated by ``,`` and shapes by ``;``; if it
names or nests them ``x-tensor-name`` has the names, see `pyserve.handlers.outputs`.

A model with several inputs has a list of them there, each with a name: ``input: [{name: a, dtype: ..., shape: ...}]``.
A request is then a JSON object or a form with these names, or the raw bytes one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyserve.context import Context
from pyserve.handler import HandlerError, InputError
from pyserve.handlers.base_handler import BaseHandler
from pyserve.handlers.numpy_file import is_numpy_file, read_numpy_file
from pyserve.handlers.outputs import ASK_JSON, Leaf, as_tensor, json_rows, kind_of, leaves, names_of, row_count
from pyserve.handlers.row_check import READ_ELSEWHERE
from pyserve.handlers.rows import bytes_of_base64, found, row_value, unwrapped
from pyserve.handlers.shared_sizes import filled_up
from pyserve.handlers.tensor_spec import (
    HOST_IS_BIG_ENDIAN,
    TensorSpec,
    dtype_name,
    input_specs,
    output_names,
    raw_bytes,
)
from pyserve.json_array import JsonArray
from pyserve.tensor_types import JSON, RAW, accepted_kind, takes_raw, wants_raw

# A JSON body of this many bytes holds at most half as many numbers, which take less than 50 us.
QUICK_SIZE_MAX = 4096

__all__ = ["JSON", "RAW", "TensorHandler", "accepted_kind"]


class TensorHandler(BaseHandler):
    """Any model that takes tensors and gives one tensor, a tuple or a dict of tensors.

    Attributes:
        specs: of its inputs, in order.
        spec: of the first.
        output_names: what the Open Inference Protocol calls its outputs, if model-config.yaml says so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.specs: list[TensorSpec] = []
        self.spec: TensorSpec | None = None
        self.output_names: tuple[str, ...] = ()

    def prepare(self, context: Context) -> None:
        super().prepare(context)
        self.specs = input_specs(self.model_yaml_config)
        self.spec = self.specs[0]
        self.output_names = output_names(self.model_yaml_config)

    def example_input(self, context: Context) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """A tensor [1, *shape]; for several inputs a tuple of them."""
        examples = tuple(spec.example() for spec in input_specs(context.model_yaml_config))
        return examples if len(examples) > 1 else examples[0]

    def is_quick(self, size: int) -> bool:
        return size <= QUICK_SIZE_MAX

    @property
    def takes_json_arrays(self) -> bool:
        return type(self) is TensorHandler

    @property
    def raw_item_size(self) -> int:
        """Bytes of one item, if it goes to the network as it comes; 0 if its bytes have to be looked at first."""
        # A subclass may do anything in its own preprocess and postprocess.
        if type(self) is not TensorHandler or len(self.specs) != 1 or HOST_IS_BIG_ENDIAN:
            return 0
        if self.spec is None or -1 in self.spec.shape or self.spec.has_to_be_read:
            return 0
        return self.spec.fixed_size

    def takes_raw(self, content_type: str, accept: str) -> bool:
        """Whether a request with these headers sends an item's bytes and is answered with bytes."""
        return takes_raw(content_type, accept)

    def raw_headers(self, output: torch.Tensor) -> list[tuple[str, str]]:
        """The headers of an answer with the bytes of a row of ``output``."""
        return _tensor_headers(((output.dtype, output.shape),), ())

    def preprocess(self, data: Sequence[Any]) -> Any:
        """Rows -> tensor [n, *shape] on the CPU; for several inputs a tuple of them.

        Raises:
            InputError: a row is not one item of the described input.
        """
        if len(self.specs) > 1:
            rows = [self._items(row) for row in data]
            return tuple(self._joined(list(column)) for column in zip(*rows, strict=True))
        if self.spec is None:
            raise HandlerError("the handler is not prepared; call initialize(context) first")
        spec = self.spec
        return self._joined([spec.padded(_item(row_value(row), spec)) for row in data])

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's output for what `preprocess` made."""
        if not isinstance(data, tuple):
            return super().inference(data, *args, **kwargs)
        first, *others = (each.to(self.get_device()) for each in data)
        return super().inference(first, *others, *args, **kwargs)

    def _joined(self, items: list[torch.Tensor]) -> torch.Tensor:
        if len(items) == 1:
            return items[0]
        try:
            return torch.cat(items)
        except RuntimeError as error:
            shapes = ", ".join(str(list(shape)) for shape in sorted({tuple(item.shape[1:]) for item in items}))
            raise InputError(f"the items of one batch have different shapes: {shapes}") from error

    def _items(self, row: Any) -> list[torch.Tensor]:
        """One tensor per input."""
        names = {spec.name for spec in self.specs}
        value = row
        # A field may be called like an input and hold the object with all of them.
        if not isinstance(row, Mapping) or not (names <= set(row) or names & set(row) - {"data", "body"}):
            value = row_value(row)
        if isinstance(value, Mapping):
            missing = [spec.wanted for spec in self.specs if spec.name not in value]
            if missing:
                raise InputError(f"{missing[0]}; the request has {found(value)} without it")
            unknown = [name for name in value if name not in names and name not in READ_ELSEWHERE]
            # A row's own fields are the server's business, and a subclass may read others before this class does.
            if unknown and value is not row and type(self) is TensorHandler:
                known = ", ".join(map(repr, sorted(names)))
                raise InputError(f"the model has no input {str(unknown[0])[:64]!r}; its inputs are {known}")
            return filled_up(self.specs, [_item(value[spec.name], spec, is_member=True) for spec in self.specs])
        wanted = ", ".join(f"{spec.name} ({spec})" for spec in self.specs)
        if not isinstance(value, (bytes, bytearray, memoryview)) or any(-1 in spec.shape for spec in self.specs):
            raise InputError(f"expected a JSON object or a form with {wanted}; got {found(value)}")
        whole, size = memoryview(value), sum(spec.fixed_size for spec in self.specs)
        if whole.nbytes != size:
            raise InputError(f"expected {size} bytes, one after the other {wanted}; got {found(value)}")
        items, at = [], 0
        for spec in self.specs:
            # A copy: what follows the first may not lie as its numbers must.
            items.append(spec.read_bytes(bytearray(whole[at : at + spec.fixed_size])))
            at += spec.fixed_size
        return items

    def postprocess(self, data: Any) -> list[Any]:
        """The model's output for n items -> n answers, each bytes or a JSON value, see `pyserve.handlers.outputs`.

        An item that asks for bytes and cannot have them, because of an output that is None or a text, is answered 400.

        Raises:
            HandlerError: the output is not made of tensors with one entry per item.
        """
        parts = leaves(data)
        count = row_count(parts)
        context = self.context
        if context is None:
            return json_rows(data, count, self.json_values)
        item_count = len(context.request_ids or ())
        if item_count not in (0, count):
            raise HandlerError(f"the model's output has {count} entries for {item_count} items")
        wants_raw = [_answers_raw(context, i) for i in range(count)]
        answers = [None] * count if all(wants_raw) else json_rows(data, count, self.json_values)
        if not any(wants_raw):
            for i in range(count):
                context.set_response_content_type(i, JSON)
            return answers
        raw_answers, headers, refusal = _raw_answers(parts, count, self.output_names)
        for i, raw in enumerate(wants_raw):
            if not raw:
                context.set_response_content_type(i, JSON)
            elif refusal:
                answers[i] = refusal
                context.set_response_status(refusal["code"], "", i)
                context.set_response_content_type(i, JSON)
            else:
                answers[i] = raw_answers[i]
                for name, value in headers:
                    context.set_response_header(i, name, value)
        return answers


def _item(value: Any, spec: TensorSpec, *, is_member: bool = False) -> torch.Tensor:
    """One input as it came, checked, not padded."""
    inner = unwrapped(value, "b64", *((spec.name,) if spec.name else ()))
    if isinstance(inner, str) and (is_member or inner is not value):
        decoded = bytes_of_base64(inner)
        if decoded is None:
            raise InputError(
                f"{spec.wanted}, got {found(inner)}, which is not base64: letters, digits, + and /, filled up with = "
                "to a multiple of four characters"
            )
        inner = decoded
    if isinstance(inner, (bytes, bytearray, memoryview)):
        return read_numpy_file(inner, spec) if is_numpy_file(inner) else spec.read_bytes(inner)
    if isinstance(inner, (list, int, float, JsonArray)):
        return spec.read_nested(inner)
    raise InputError(
        f"{spec.wanted} as raw bytes or a .npy file ({RAW}) or as nested lists ({JSON}), got {found(value)}"
    )


def _raw_answers(
    parts: list[Leaf], count: int, configured: tuple[str, ...]
) -> tuple[list[Any], list[tuple[str, str]], dict[str, Any]]:
    """Per item the bytes of all outputs, one after the other; the headers of each; or what to answer instead."""
    tensors = [as_tensor(leaf, count) for leaf in parts]
    outputs = [tensor for tensor in tensors if tensor is not None]
    names = names_of(parts, configured)
    for name, leaf, tensor in zip(names, parts, tensors, strict=True):
        if tensor is None:
            text = f"output {name!r} is {kind_of(leaf.value)}, for which there are no raw bytes; {ASK_JSON}"
            return [], [], {"code": InputError.status, "type": InputError.type, "message": text}
    columns = []
    for output in outputs:
        whole = raw_bytes(output)
        size = len(whole) // count if count else 0
        columns.append([whole] if count == 1 else [whole[i * size : (i + 1) * size] for i in range(count)])
    # Names only where the model has some: those of a tensor or of a tuple of tensors are in their order.
    is_flat = all(not leaf.path or (len(leaf.path) == 1 and isinstance(leaf.path[0], int)) for leaf in parts)
    kinds = tuple((output.dtype, output.shape) for output in outputs)
    headers = _tensor_headers(kinds, () if is_flat else tuple(names))
    answers = columns[0] if len(columns) == 1 else [b"".join(row) for row in zip(*columns, strict=True)]
    return answers, headers, {}


@functools.lru_cache(maxsize=256)
def _tensor_headers(kinds: tuple[tuple[torch.dtype, torch.Size], ...], names: tuple[str, ...]) -> list[tuple[str, str]]:
    headers = [
        ("content-type", RAW),
        ("x-tensor-dtype", ",".join(dtype_name(dtype) for dtype, _ in kinds)),
        ("x-tensor-shape", ";".join(",".join(map(str, shape[1:])) for _, shape in kinds)),
    ]
    if names:
        headers.append(("x-tensor-name", ",".join(names)))
    return headers


def _answers_raw(context: Context, idx: int) -> bool:
    content_type = context.get_request_header(idx, "Content-Type") or ""
    return wants_raw(content_type, context.get_request_header(idx, "Accept") or "")
