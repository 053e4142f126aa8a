"""Pictures in, the class of each pixel out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pyserve.handler import HandlerError
from pyserve.handlers.vision_handler import VisionHandler


class ImageSegmenter(VisionHandler):
    """Any model from [n, 3, 224, 224] to scores [n, classes, height, width], alone or as ``out`` of a dict."""

    def postprocess(self, data: Any) -> list[Any]:
        """Scores -> per row nested lists [height, width, 2]: the most probable class of each pixel, its probability.

        Raises:
            HandlerError: the model's output is of another form.
        """
        scores = data.get("out") if isinstance(data, Mapping) else data
        if not isinstance(scores, torch.Tensor) or scores.dim() != 4 or scores.shape[1] == 0:
            shape = f"shape {list(scores.shape)}" if isinstance(scores, torch.Tensor) else f"a {type(data).__name__}"
            raise HandlerError(
                "image_segmenter needs a dict with 'out', scores [batch, classes, height, width], from the model, got "
                f"{shape}"
            )
        probabilities, classes = torch.softmax(scores.float(), dim=1).max(dim=1)
        return self.finished(torch.stack([classes.to(probabilities.dtype), probabilities], dim=3))

    @property
    def finish(self) -> tuple[str, int]:
        """What a worker may do of `postprocess` in its place, so that the scores stay where they are."""
        return "classes", 0

    def finished(self, found: torch.Tensor) -> list[Any]:
        """Answers from class and probability of each pixel [n, height, width, 2]."""
        return self.json_values(found)

    def get_insights(self, tensor_data: Any, raw_data: Any, target: int = 0) -> list[Any]:
        """Refuses: a segmentation has a class per pixel, so there is no one score to explain."""
        return super(VisionHandler, self).get_insights(tensor_data, raw_data, target)
