"""Continues a text word by word, and sends each word when it is known."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ts.handler_utils.utils import send_intermediate_predict_response

from pyserve.context import Context
from pyserve.handler import PredictionException
from pyserve.handlers.base_handler import BaseHandler

LARGEST_COUNT = 1000


class StoryHandler(BaseHandler):
    """One request at a time: batches hold one item unless model-config.yaml says something else."""

    def initialize(self, context: Context) -> None:
        super().initialize(context)
        self.vocabulary = json.loads(Path(context.system_properties["model_dir"], "vocabulary.json").read_text())
        self.pause_s = context.model_yaml_config["handler"]["pause_s"]

    def handle(self, data: Sequence[Any], context: Context) -> list[str]:
        """A request's words are parts of its answer. What is returned is the last of them."""
        prompt, count = self.read(data[0].get("body"))
        counter = context.metrics.add_metric_to_cache("WordsSent", "count")
        context.set_response_content_type(0, "text/plain; charset=utf-8")
        words = self.following(prompt)
        for _ in range(count - 1):
            if context.cancelled:  # the client has gone: nobody sees what comes
                return [""]
            send_intermediate_predict_response([f"{next(words)} "], context.request_ids, "part", 200, context)
            counter.add_or_update(1)
        return [f"{next(words)}\n"]

    def read(self, body: Any) -> tuple[list[int], int]:
        """The numbers of the words to continue, and how many are wanted. Refused: a bad request has no parts."""
        if not isinstance(body, dict):
            raise PredictionException('send JSON such as {"prompt": "a server", "count": 20}', 400)
        prompt, count = str(body.get("prompt", "")).split(), body.get("count", 20)
        unknown = [word for word in prompt if word not in self.vocabulary]
        if unknown or not prompt:
            raise PredictionException(f"prompt must have words of text.txt only, not {unknown}", 400)
        if not isinstance(count, int) or not 1 <= count <= LARGEST_COUNT:
            raise PredictionException(f"count must be 1 to {LARGEST_COUNT}, not {count!r}", 400)
        return [self.vocabulary.index(word) for word in prompt], count

    def following(self, prompt: list[int]) -> Any:
        """The words after ``prompt``, without end."""
        numbers, memory = torch.tensor([prompt]), None
        while True:
            with torch.inference_mode():
                scores, memory = self.model(numbers, memory)
            numbers = scores[:, -1:].argmax(2)
            time.sleep(self.pause_s)
            yield self.vocabulary[int(numbers)]
