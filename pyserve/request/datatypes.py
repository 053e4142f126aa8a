"""What the Open Inference Protocol calls the dtypes of torch."""

from __future__ import annotations

import torch

BYTES = "BYTES"
_DATATYPES = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}


DATATYPES = (*_DATATYPES, BYTES)
_DATATYPE_OF = {dtype: datatype for datatype, dtype in _DATATYPES.items()}


def datatype_of(dtype: torch.dtype) -> str:
    """``FP32`` for ``torch.float32``. KeyError if the protocol has no name for it."""
    return _DATATYPE_OF[dtype]


def dtype_of(datatype: str) -> torch.dtype:
    """``torch.float32`` for ``FP32``. KeyError for BYTES."""
    return _DATATYPES[datatype]
