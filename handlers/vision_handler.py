"""What handlers for pictures have in common: from request rows to tensors, and explanations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from pyserve.context import Context
from pyserve.handler import InputError
from pyserve.handlers.base_handler import BaseHandler
from pyserve.handlers.device_jpeg import DeviceJpeg, square_of
from pyserve.handlers.explanation import integrated_gradients, require_gradients
from pyserve.handlers.image import (
    ImageNetTransform,
    RgbTransform,
    opened_picture,
    orientation,
    picture_file,
    picture_header,
    size_resized,
)
from pyserve.handlers.pixels import Normalization
from pyserve.handlers.plain import is_plain
from pyserve.handlers.row_check import is_built_in
from pyserve.handlers.rows import found, row_value, unwrapped
from pyserve.handlers.tensor_spec import TensorSpec
from pyserve.json_array import JsonArray

NESTED_PIXELS = TensorSpec("float32", (-1, -1, -1))
# From a picture to numbers.
_STEPS = ("preprocess", "_pictures", "_pixels", "_processed", "_uploaded")


class VisionHandler(BaseHandler):
    """Pictures in; subclasses override `postprocess`.

    Attributes:
        image_processing: picture -> float32 tensor [3, height, width]. Any callable that takes a Pillow image, such as
            a transform of torchvision; subclasses replace it.
    """

    sample_kind = "picture"
    image_processing: Callable[[Image.Image], torch.Tensor] = ImageNetTransform()
    _limit_pixels = True
    _applies_exif = False
    _device_jpeg: DeviceJpeg | None = None
    _pixels_by: ImageNetTransform | RgbTransform | None = None  # makes bytes of pictures in place of numbers

    def prepare(self, context: Context) -> None:
        super().prepare(context)
        self._applies_exif = str(context.model_yaml_config.get("exif", "")).lower() == "true"  # it may be quoted
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

    def send_pixels(self) -> Normalization | None:
        """From now on `preprocess` makes uint8 [n, height, width, 3] of picture files; to normalise them as returned is
        left to the caller. None, and nothing changes, if the way from pictures to numbers is not all pyserve's own.
        """  # fmt: skip
        transform: Any = self.image_processing
        if type(transform) not in (ImageNetTransform, RgbTransform) or not all(map(self._is_ours, _STEPS)):
            return None
        self._pixels_by = transform
        return transform.normalization

    def _is_ours(self, name: str) -> bool:
        origin = next(cls for cls in type(self).__mro__ if name in vars(cls))
        return origin.__module__.startswith("pyserve.handlers.") and name not in vars(self)

    def decode_jpeg_on(self, device: torch.device) -> bool:
        """Has torchvision decode JPEG on ``device``, where the bytes then stay; False if bytes are not what it makes.

        Raises:
            ModelLoadError: there is no torchvision that could.
        """
        if type(self._pixels_by) is ImageNetTransform:
            self._device_jpeg = DeviceJpeg(device)
        return self._device_jpeg is not None

    def keep_numbers(self) -> None:
        """Takes `send_pixels` back."""
        self._pixels_by = self._device_jpeg = None

    def preprocess(self, data: Sequence[Any]) -> Any:
        """Rows -> float32 tensor [n, 3, height, width] on the handler's device.

        A row is a picture file (bytes), one as base64 text, or nested lists of numbers [channels, height, width],
        which are taken as they are; or an object with one of these as its member ``data``.

        Raises:
            InputError: a row is none of these.
        """
        pictures = self._pictures(data)
        if len(pictures) == 1:
            return self._uploaded(pictures[0].unsqueeze(0))
        try:
            batch = torch.stack(pictures)
        except RuntimeError as error:
            shapes = ", ".join(str(list(shape)) for shape in sorted({tuple(item.shape) for item in pictures}))
            raise InputError(f"the pictures of one batch have different shapes: {shapes}") from error
        return self._uploaded(batch)

    def _pictures(self, data: Sequence[Any]) -> list[torch.Tensor]:
        """The numbers of each row [channels, height, width]; or, where these are made later, the bytes of all."""
        if self._normalizes_on_device() and self._pixels_by is None:
            self.send_pixels()
        pictures = [self._pixels(row_value(row)) for row in data]
        if self._pixels_by is None or len({picture.dtype for picture in pictures}) == 1:
            return pictures
        numbers = self._pixels_by.normalization.numbers  # some rows are numbers already
        return [numbers(each[None])[0] if each.dtype is torch.uint8 else each for each in pictures]

    def _uploaded(self, batch: torch.Tensor) -> torch.Tensor:
        """``batch`` [n, ...] on the handler's device, where bytes become numbers unless the caller does that."""
        if self._pixels_by is None or batch.dtype is not torch.uint8:
            return batch.to(self.get_device())
        if not self._normalizes_on_device():
            return batch  # on the host, or where it was decoded
        return self._pixels_by.normalization.numbers(batch.to(self.get_device()))

    def _normalizes_on_device(self) -> bool:
        """Whether it calls the model itself, on an accelerator, and no code of others sees what it makes."""
        return self.get_device().type != "cpu" and is_built_in(self) and not is_plain()

    def _pixels(self, value: Any) -> torch.Tensor:
        value = unwrapped(value, "b64")
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self._processed(value)
        if isinstance(value, str):
            return self._processed(picture_file(value))
        if isinstance(value, (list, JsonArray)):
            return NESTED_PIXELS.from_nested(value)[0]
        has_url = isinstance(value, dict) and "url" in value
        fix = "; a picture is not fetched from a URL: send the file" if has_url else ""
        raise InputError(
            'expected a picture file, its base64 text, {"data": that text} or nested lists of numbers, got '
            f"{found(value)}{fix}"
        )

    def _processed(self, file: bytes | bytearray | memoryview) -> torch.Tensor:
        pixels = self._decoded_on_device(file) if self._device_jpeg is not None else None
        if pixels is not None:
            return pixels
        with opened_picture(
            file, self.image_processing, limit_pixels=self._limit_pixels, exif=self._applies_exif
        ) as picture:
            transform, ours = self.image_processing, self._pixels_by
            return ours.pixels(picture) if ours is not None and transform is ours else transform(picture)

    def _decoded_on_device(self, file: bytes | bytearray | memoryview) -> torch.Tensor | None:
        transform, decoder = self.image_processing, self._device_jpeg
        if decoder is None or transform is not self._pixels_by or not isinstance(transform, ImageNetTransform):
            return None
        with picture_header(file, limit_pixels=self._limit_pixels) as header:
            if header.format != "JPEG" or header.mode not in ("RGB", "L"):
                return None
            if self._applies_exif and orientation(header) != 1:
                return None
            size_resized(header.width, header.height, transform.resize)
        return decoder.decoded(file, lambda planes: square_of(planes, transform.resize, transform.crop))

    def get_insights(self, tensor_data: Any, raw_data: Sequence[Any], target: int = 0) -> list[Any]:
        """Per row nested lists of the shape of its pixels: how much each speaks for class ``target``.

        Raises:
            PredictionException: captum is not installed, or the model gives no gradients (status 501).
        """
        return self.json_values(integrated_gradients(require_gradients(self.model), tensor_data, target))
