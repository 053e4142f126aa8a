"""A request of the Open Inference Protocol without JSON: the body is the one input (Triton's raw binary request).

Inference-Header-Content-Length: 0
"""

from __future__ import annotations

from pyserve.api.open_inference import InferInput
from pyserve.errors import InputError
from pyserve.handlers.tensor_spec import TensorSpec
from pyserve.request.datatypes import BYTES, datatype_of

NAME = "input0"


def raw_element(body: memoryview) -> InferInput:
    """One element of BYTES."""
    return InferInput(NAME, BYTES, (1,), [body])


def raw_tensor(spec: TensorSpec, body: memoryview) -> InferInput:
    """Numbers as ``spec`` describes them: as many rows as there are, or one row whose free dimension takes them all.

    Raises:
        InputError: they are not whole rows, or the shape has several free dimensions.
    """
    free = [index for index, size in enumerate(spec.shape) if size < 0]
    if len(free) > 1:
        raise InputError(f"a body without JSON does not say its shape, and the model's input is {spec}; send the JSON")
    count, rest = divmod(body.nbytes, spec.fixed_size)
    if rest or not count:
        size = f"{spec.fixed_size} bytes"
        raise InputError(f"a body without JSON must be whole rows of {spec}, {size} each; got {body.nbytes}")
    row = [count if size < 0 else size for size in spec.shape]
    shape = (1, *row) if free else (count, *row)
    return InferInput(spec.name or NAME, datatype_of(spec.torch_dtype), shape, body)
