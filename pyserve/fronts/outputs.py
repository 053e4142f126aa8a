"""What a front end has of a request that crosses as a tensor, and what it makes its answer of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from pyserve.request.messages import Response, SharedHeaders
from pyserve.telemetry.stage_times import StageTimes

_DTYPES = {
    "f": "float32", "d": "float64", "b": "int8", "h": "int16", "i": "int32", "q": "int64", "B": "uint8", "?": "bool",
}  # fmt: skip
DATATYPES = {
    "f": "FP32", "d": "FP64", "b": "INT8", "h": "INT16", "i": "INT32", "q": "INT64", "B": "UINT8", "?": "BOOL",
}  # fmt: skip

# What becomes of an output's row: the whole body, what follows on JSON that describes it, or JSON (csrc/row_cut.h).
AS_BYTES, AS_DESCRIBED_BYTES, AS_TEXT = range(3)

Body = bytes | bytearray | memoryview
# The answer to an output's row, whose kind and sizes the first argument has; None if it cannot be made, which the
# engine should have seen.
Encode = Callable[["Output", bytes], Response | None]


class RowTimes:
    """How long the stages of one model's requests took that are a front end's, since this was last told.

    Attributes:
        preprocess: bodies became tensors.
        postprocess: outputs became answers.
    """

    __slots__ = ("is_new", "postprocess", "preprocess")

    def __init__(self) -> None:
        self.preprocess, self.postprocess = StageTimes(), StageTimes()
        self.is_new = False  # there is something to tell

    def take(self) -> RowTimes:
        """What was noted, which is not kept."""
        taken = RowTimes()
        taken.preprocess, taken.postprocess, taken.is_new = self.preprocess, self.postprocess, self.is_new
        self.preprocess, self.postprocess, self.is_new = StageTimes(), StageTimes(), False
        return taken

    def add(self, preprocess: tuple[list[int], float], postprocess: tuple[list[int], float]) -> None:
        """What was noted elsewhere: counts and the sum in s of each; no counts if nothing was."""
        for times, (counts, total_s) in ((self.preprocess, preprocess), (self.postprocess, postprocess)):
            if counts:
                times.add(counts, total_s)
                self.is_new = True

    def note_decoded(self, seconds: float) -> None:
        self.preprocess.observe(seconds)
        self.is_new = True

    def note_encoded(self, seconds: float) -> None:
        self.postprocess.observe(seconds)
        self.is_new = True


class Row(NamedTuple):
    """A request as a tensor.

    Attributes:
        route: its model's place in the table.
        item: the tensor's bytes.
        encode: makes the answer.
        form: what it makes of the output's row. The engine answers by itself where that cannot be made of it.
        times: of what is done here to such requests, where that is counted; else None.
        decoding_s: how long its body took to become the tensor, if ``times`` is there.
    """

    route: int
    item: Body
    encode: Encode
    form: int
    times: RowTimes | None = None
    decoding_s: float = 0.0


class Output(NamedTuple):
    """What a model's output is, for one item."""

    kind: str
    shape: tuple[int, ...]
    raw_headers: SharedHeaders

    @classmethod
    def read(cls, head: bytes) -> Output:
        """From the head of an answer: ``f10``, ``q3,224``, ``f``. ValueError if it is no such one."""
        text = head.decode("ascii")
        kind, sizes = text[:1], text[1:]
        shape = tuple(map(int, sizes.split(","))) if sizes else ()
        if kind not in _DTYPES or any(size < 0 for size in shape):
            raise ValueError("an output of an unknown kind")
        headers = SharedHeaders({"x-tensor-dtype": _DTYPES[kind], "x-tensor-shape": sizes})
        return cls(kind, shape, headers)

    def values(self, row: bytes) -> Any:
        """The numbers as nested lists. ValueError if one of them has no word in JSON, or they are not as many."""
        flat: list[Any] = memoryview(row).cast(self.kind).tolist()  # type: ignore[call-overload]
        if len(flat) != math.prod(self.shape) or not flat:
            raise ValueError("an output of another size, or with nothing in it")
        if self.kind in "fd" and not all(map(math.isfinite, flat)):
            raise ValueError("a number that is not finite")
        values: Any = flat
        for size in reversed(self.shape[1:]):
            values = [values[at : at + size] for at in range(0, len(values), size)]
        return values if self.shape else flat[0]
