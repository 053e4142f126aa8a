"""What handlers for pictures have in common: from request rows to tensors, and explanations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from pyserve.context import Context
from pyserve.handler import InputError
from pyserve.handlers.base_handler import BaseHandler
from pyserve.handlers.explanation import integrated_gradients, require_gradients
from pyserve.handlers.image import ImageNetTransform, opened_picture, picture_file
from pyserve.handlers.row_check import is_built_in
from pyserve.handlers.rows import found, row_value
from pyserve.handlers.tensor_spec import TensorSpec
from pyserve.json_array import JsonArray

NESTED_PIXELS = TensorSpec("float32", (-1, -1, -1))


class VisionHandler(BaseHandler):
    """Pictures in; subclasses override `postprocess`.

    Attributes:
        image_processing: picture -> float32 tensor [3, height, width]. Any callable that takes a Pillow image, such as
            a transform of torchvision; subclasses replace it.
    """

    sample_kind = "picture"
    image_processing: Callable[[Image.Image], torch.Tensor] = ImageNetTransform()
    _limit_pixels = True

    def prepare(self, context: Context) -> None:
        super().prepare(context)
        self._limit_pixels = context.system_properties.get("limit_max_image_pixels", True) is not False
        if not self._limit_pixels:
            Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is for the whole process; ours is per model

    def example_input(self, context: Context) -> torch.Tensor:
        """Seeded noise [1, 3, 224, 224], normalised as pictures are; [1, *shape] if model-config.yaml has ``input``."""
        if context.model_yaml_config.get("input") is not None:
            return TensorSpec.from_config(context.model_yaml_config).example()
        return torch.randn((1, 3, 224, 224), generator=torch.Generator().manual_seed(0))

    @property
    def takes_json_arrays(self) -> bool:
        return is_built_in(self)

    def is_quick(self, size: int) -> bool:
        """False: decoding takes milliseconds."""
        return False

    def preprocess(self, data: Sequence[Any]) -> Any:
        """Rows -> float32 tensor [n, 3, height, width] on the handler's device.

        A row is a picture file (bytes), one as base64 text, or nested lists of numbers [channels, height, width],
        which are taken as they are.

        Raises:
            InputError: a row is none of these.
        """
        pictures = [self._pixels(row_value(row)) for row in data]
        if len(pictures) == 1:
            return pictures[0].unsqueeze(0).to(self.get_device())
        try:
            return torch.stack(pictures).to(self.get_device())
        except RuntimeError as error:
            shapes = ", ".join(str(list(shape)) for shape in sorted({tuple(item.shape) for item in pictures}))
            raise InputError(f"the pictures of one batch have different shapes: {shapes}") from error

    def _pixels(self, value: Any) -> torch.Tensor:
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self._processed(value)
        if isinstance(value, str):
            return self._processed(picture_file(value))
        if isinstance(value, (list, JsonArray)):
            return NESTED_PIXELS.from_nested(value)[0]
        raise InputError(f"expected a picture file, its base64 text or nested lists of numbers, got {found(value)}")

    def _processed(self, file: bytes | bytearray | memoryview) -> torch.Tensor:
        with opened_picture(file, self.image_processing, limit_pixels=self._limit_pixels) as picture:
            return self.image_processing(picture)

    def get_insights(self, tensor_data: Any, raw_data: Sequence[Any], target: int = 0) -> list[Any]:
        """Per row nested lists of the shape of its pixels: how much each speaks for class ``target``.

        Raises:
            PredictionException: captum is not installed, or the model gives no gradients (status 501).
        """
        return self.json_values(integrated_gradients(require_gradients(self.model), tensor_data, target))
