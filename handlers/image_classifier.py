"""Pictures in, the most probable labels out."""

from __future__ import annotations

from typing import Any

import torch

from pyserve.handler import HandlerError
from pyserve.handlers.labels import labelled
from pyserve.handlers.vision_handler import VisionHandler


class ImageClassifier(VisionHandler):
    """Any model from [n, 3, 224, 224] to [n, classes] scores.

    Attributes:
        topk: how many classes an answer names, fewer if the model has fewer.
    """

    topk = 5

    def set_max_result_classes(self, topk: int) -> None:
        """Name the ``topk`` most probable classes from now on. ValueError unless it is 1 or more."""
        if topk < 1:
            raise ValueError(f"an answer names at least 1 class, got {topk}")
        self.topk = topk

    def get_max_result_classes(self) -> int:
        return self.topk

    def postprocess(self, data: Any) -> list[Any]:
        """Scores [n, classes] -> per row a dict from label to probability, the most probable first.

        Classes with the same label are kept apart, see `labelled`. A NaN probability becomes None.

        Raises:
            HandlerError: the model's output is not [n, classes].
        """
        if not isinstance(data, torch.Tensor) or data.dim() != 2 or data.shape[1] == 0:
            shape = f"shape {list(data.shape)}" if isinstance(data, torch.Tensor) else f"a {type(data).__name__}"
            raise HandlerError(f"image_classifier needs scores [batch, classes] from the model, got {shape}")
        probabilities, classes = torch.softmax(data.float(), dim=1).topk(min(self.topk, data.shape[1]), dim=1)
        return self.finished(probabilities, classes)

    @property
    def finish(self) -> tuple[str, int]:
        """What a worker may do of `postprocess` in its place; `finished` does the rest."""
        return "ranked", self.topk

    def finished(self, probabilities: torch.Tensor, classes: torch.Tensor) -> list[Any]:
        """Answers from the most probable classes of each row [n, k], the most probable first."""
        return [
            labelled(row, indices, self.mapping)
            for row, indices in zip(self.json_values(probabilities), classes.tolist(), strict=True)
        ]
