"""The models of the campaign: each one's archive, and answers that are known byte for byte without torch."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin

from tests.support.handler_archives import ECHO, write_handler
from tests.support.sequence_adder import ADDER
from tests.support.serving_models import write_torchscript

COLOURS = 8
_FACTORS = {"1.0": (3, 5, 7, 11), "2.0": (13, 2, 17, 6)}

STREAMER = """
from ts.handler_utils.utils import send_intermediate_predict_response


class Streamer:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        ids = [bytes(row["body"]).decode() for row in data]
        for part in range(4):
            send_intermediate_predict_response(
                ["%s part %d;" % (id, part) for id in ids], context.request_ids, "Intermediate", 200, context)
        return ["%s end" % id for id in ids]
"""


class Mix(torch.nn.Module):
    """[n, 4] whole numbers below 4096 -> [n, 4], exact in float32 in any order of additions."""

    def __init__(self, version: str) -> None:
        super().__init__()
        factors = torch.tensor(_FACTORS[version], dtype=torch.float32)
        self.weight = torch.nn.Parameter(torch.eye(4) + torch.ones(4, 4) * factors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Colours(torch.nn.Module):
    """[n, 3, 224, 224] -> [n, 12]: which of red, green and blue are bright, the same in any batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = (x.mean((2, 3)) > 0).to(x.dtype)
        place = bright[:, :1] + 2 * bright[:, 1:2] + 4 * bright[:, 2:]
        return -(torch.arange(12).to(x.dtype) - place).abs()


def mixed(numbers: tuple[int, int, int, int], version: str) -> bytes:
    """The answer of ``linear`` to these numbers."""
    total = sum(numbers)
    return struct.pack("<4f", *(n + total * factor for n, factor in zip(numbers, _FACTORS[version], strict=True)))


def picture(colour: int, comment: str) -> bytes:
    """A PNG of one of the COLOURS; ``comment`` makes the file one of its own."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", comment)
    bright = tuple(230 if colour >> place & 1 else 10 for place in range(3))
    file = io.BytesIO()
    Image.new("RGB", (40, 40), bright).save(file, "PNG", pnginfo=notes)
    return file.getvalue()


def write_archives(store: Path) -> None:
    """``linear.mar`` and ``linear-2.mar`` (native), ``pictures.mar`` (native), ``echo.mar``, ``streamer.mar`` and
    ``adder.mar`` (Python)."""
    numbers = {"input": {"dtype": "float32", "shape": [4]}, "batchSize": 8}
    for version, file in (("1.0", "linear"), ("2.0", "linear-2")):
        write_torchscript(store, Mix(version), "linear", version=version, file=file, config=numbers)
    labels = {str(index): f"colour {index}" for index in range(12)}
    write_torchscript(store, Colours(), "pictures", handler="image_classifier", labels=labels, config={"batchSize": 4})
    write_handler(store, "echo", ECHO, config={"batchSize": 4, "minWorkers": 2, "maxWorkers": 2})
    write_handler(store, "streamer", STREAMER, config={"batchSize": 2, "minWorkers": 1, "maxWorkers": 1})
    sequences = {"sequenceBatching": True, "sequenceMaxIdleMSec": 600_000, "batchSize": 4, "maxNumSequence": 100,
                 "maxSequenceJobQueueSize": 20, "minWorkers": 1, "maxWorkers": 1}  # fmt: skip
    write_handler(store, "adder", ADDER, config=sequences)
