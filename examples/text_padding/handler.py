"""From a text to a verdict. The server pads: `input` in model-config.yaml says to which lengths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyserve.context import Context
from pyserve.handler import InputError
from pyserve.handlers.tensor import TensorHandler

UNKNOWN = 1


class ReviewHandler(TensorHandler):
    """`TensorHandler` takes numbers; this makes numbers of words, and words of numbers."""

    def prepare(self, context: Context) -> None:
        super().prepare(context)
        self.vocabulary = json.loads(Path(context.system_properties["model_dir"], "vocabulary.json").read_text())

    def preprocess(self, data: Sequence[Any]) -> Any:
        """Texts -> their words' numbers and masks, each filled up with 0 to the next length of ``pad_to``."""
        return super().preprocess([self.numbers(row.get("body")) for row in data])

    def numbers(self, text: Any) -> dict[str, list[int]]:
        """The inputs of the network, not padded yet."""
        if isinstance(text, bytes | bytearray):  # of a request that does not say what it is
            text = text.decode(errors="replace")
        if not isinstance(text, str):
            raise InputError("send the review as text: Content-Type: text/plain")
        words = text.lower().replace(".", " ").replace(",", " ").split()
        if not words:
            raise InputError("the review has no words")
        return {"ids": [self.vocabulary.get(word, UNKNOWN) for word in words], "mask": [1] * len(words)}

    def postprocess(self, data: torch.Tensor) -> list[dict[str, Any]]:
        """Scores [n, 2] -> how good each review is, from 0 to 1."""
        return [{"good": value} for value in torch.softmax(data, 1)[:, 1].tolist()]
