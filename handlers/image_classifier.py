"""Pictures in, the most probable labels out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from pyserve.context import Context
from pyserve.handler import HandlerError, InputError
from pyserve.handlers.base_handler import BaseHandler
from pyserve.handlers.image import ImageNetTransform, open_picture, picture_from_base64
from pyserve.handlers.rows import found, row_value
from pyserve.handlers.tensor_spec import TensorSpec


class ImageClassifier(BaseHandler):
    """Any model from [n, 3, 224, 224] to [n, classes] scores.

    Attributes:
        topk: how many classes an answer names, fewer if the model has fewer.
        image_processing: picture -> float32 tensor [3, height, width]; subclasses may replace it.
    """

    sample_kind = "picture"
    topk = 5
    image_processing: Callable[[Image.Image], torch.Tensor] = ImageNetTransform()

    def __init__(self) -> None:
        super().__init__()
        self._limit_pixels = True

    def prepare(self, context: Context) -> None:
        super().prepare(context)
        self._limit_pixels = context.system_properties.get("limit_max_image_pixels", True) is not False
        if not self._limit_pixels:
            Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is for the whole process; ours is per model

    def set_max_result_classes(self, topk: int) -> None:
        """Name the ``topk`` most probable classes from now on. ValueError unless it is 1 or more."""
        if topk < 1:
            raise ValueError(f"an answer names at least 1 class, got {topk}")
        self.topk = topk

    def get_max_result_classes(self) -> int:
        return self.topk

    def example_input(self, context: Context) -> torch.Tensor:
        """Seeded noise [1, 3, 224, 224], normalised as pictures are; [1, *shape] if model-config.yaml has ``input``."""
        if context.model_yaml_config.get("input") is not None:
            return TensorSpec.from_config(context.model_yaml_config).example()
        return torch.randn((1, 3, 224, 224), generator=torch.Generator().manual_seed(0))

    def is_quick(self, size: int) -> bool:
        """False: decoding takes milliseconds."""
        return False

    def preprocess(self, data: Sequence[Any]) -> torch.Tensor:
        """Rows -> float32 tensor [n, 3, 224, 224].

        A row is a picture file (bytes), one as base64 text, or nested lists of numbers [channels, height, width],
        which are taken as they are.

        Raises:
            InputError: a row is none of these.
        """
        pictures = [self._pixels(row_value(row)) for row in data]
        if len(pictures) == 1:
            return pictures[0].unsqueeze(0)
        try:
            return torch.stack(pictures)
        except RuntimeError as error:
            shapes = ", ".join(str(list(shape)) for shape in sorted({tuple(item.shape) for item in pictures}))
            raise InputError(f"the pictures of one batch have different shapes: {shapes}") from error

    def _pixels(self, value: Any) -> torch.Tensor:
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self.image_processing(open_picture(value, limit_pixels=self._limit_pixels))
        if isinstance(value, str):
            return self.image_processing(picture_from_base64(value, limit_pixels=self._limit_pixels))
        if isinstance(value, list):
            return NESTED_PIXELS.from_nested(value)[0]
        raise InputError(f"expected a picture file, its base64 text or nested lists of numbers, got {found(value)}")

    def postprocess(self, data: Any) -> list[Any]:
        """Scores [n, classes] -> per row a dict from label to probability, the most probable first.

        Of classes with the same label the more probable keeps it, the others get their class index behind it:
        ``{"crane": 0.6, "crane (517)": 0.3}``. A NaN probability becomes None.

        Raises:
            HandlerError: the model's output is not [n, classes].
        """
        if not isinstance(data, torch.Tensor) or data.dim() != 2 or data.shape[1] == 0:
            shape = f"shape {list(data.shape)}" if isinstance(data, torch.Tensor) else f"a {type(data).__name__}"
            raise HandlerError(f"image_classifier needs scores [batch, classes] from the model, got {shape}")
        probabilities, classes = torch.softmax(data.float(), dim=1).topk(min(self.topk, data.shape[1]), dim=1)
        return [
            self._labelled(row, indices)
            for row, indices in zip(self.json_values(probabilities), classes.tolist(), strict=True)
        ]

    def _labelled(self, probabilities: list[float], indices: list[int]) -> dict[str, float]:
        mapping = self.mapping or {}
        answer: dict[str, float] = {}
        for probability, index in zip(probabilities, indices, strict=True):
            label = mapping.get(str(index), str(index))
            answer[label if label not in answer else f"{label} ({index})"] = probability
        return answer


NESTED_PIXELS = TensorSpec("float32", (-1, -1, -1))
