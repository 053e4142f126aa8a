import datetime
import decimal

import numpy
import torch

VALUES = {
    "int": 3, "float": 0.1, "bool": True, "none": None, "nan": float("nan"), "text": "é", "list": [1, "a", None],
    "tuple": (1, 2), "dict": {1: "a", "b": [1.0]}, "bytes": b"abc", "bytearray": bytearray(b"abc"), "empty": "",
    "set": {1}, "date": datetime.date(2024, 1, 2), "decimal": decimal.Decimal("1.5"), "complex": 1j,
    "numpy": numpy.float32(1.5), "array": numpy.arange(3), "object": object, "tensor": torch.tensor([1.0]),
}


def handle(data, context):
    if data is None:
        return None
    return [VALUES[bytes(row["body"]).decode()] for row in data]
