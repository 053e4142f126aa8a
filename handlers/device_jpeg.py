"""JPEG decoded by the accelerator, through torchvision: for those who choose it, since its pixels are not Pillow's.

Files that several threads bring while others are decoded go to the device together: a list costs little more than one.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from pyserve.handler import ModelLoadError
from pyserve.handlers.image import crop_start, size_resized

FILES_MAX = 64
_MAGIC = b"\xff\xd8\xff"

Body = bytes | bytearray | memoryview


class _File:
    """A file on its way, and then its planes [3, height, width]; None if the device cannot decode it."""

    def __init__(self, body: Body):
        self.body = body
        self.planes: torch.Tensor | None = None
        self.is_over = False


class DeviceJpeg:
    """The decoder of one model. Any thread.

    Args:
        device: where pictures are decoded, and stay.

    Raises:
        ModelLoadError: torchvision is not installed, or has no decoder for that device.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._decode, self._mode = _torchvision()
        self._stream = torch.Stream(device)
        self._turn = threading.Lock()  # whoever has it decodes all that wait
        self._waiting: list[_File] = []
        self._guard = threading.Lock()

    def decoded(self, body: Body, made_of_it: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
        """What ``made_of_it`` makes of a JPEG's planes [3, height, width], on the device and complete. None if it is no
        JPEG, or the device cannot decode it.
        """  # fmt: skip
        if bytes(body[:3]) != _MAGIC:
            return None
        file = _File(body)
        with self._guard:
            self._waiting.append(file)
        with self._turn:
            while not file.is_over:
                self._decode_waiting()
            if file.planes is None:
                return None
            with self._stream:
                made = made_of_it(file.planes)
        # The engine's streams wait for the stream of the thread that submits, which is another one.
        self._stream.synchronize()
        return made

    def _decode_waiting(self) -> None:
        with self._guard:
            files, self._waiting = self._waiting[:FILES_MAX], self._waiting[FILES_MAX:]
        try:
            with self._stream:
                self._decode_each(files)
        finally:
            for file in files:
                file.is_over = True

    def _decode_each(self, files: list[_File]) -> None:
        """All at once; one by one if one of them is damaged, or of a kind that the device cannot decode."""
        try:
            self._decode_list(files)
        except RuntimeError:  # Pillow has the words for it
            for file in files if len(files) > 1 else ():
                with contextlib.suppress(RuntimeError):
                    self._decode_list([file])

    def _decode_list(self, files: list[_File]) -> None:
        numbers = [torch.frombuffer(bytearray(file.body), dtype=torch.uint8) for file in files]
        for file, planes in zip(files, self._decode(numbers, mode=self._mode, device=self._device), strict=True):
            file.planes = planes


def _torchvision() -> tuple[Any, Any]:
    try:
        io: Any = importlib.import_module("torchvision.io")
        return io.decode_jpeg, io.ImageReadMode.RGB
    except (ImportError, AttributeError) as error:
        raise ModelLoadError(
            "'jpegDecoder: torchvision' in model-config.yaml needs torchvision with torchvision.io.decode_jpeg, which "
            f"cannot be used here ({error}); install the torchvision of this torch, or take jpegDecoder out"
        ) from error


def square_of(planes: torch.Tensor, resize: int, crop: int) -> torch.Tensor:
    """Planes [3, height, width] -> the bytes [crop, crop, 3] that `ImageNetTransform` cuts out, on their device.

    Bilinear and antialiased as Pillow's, but not the same to the last bit.
    """
    _, height, width = planes.shape
    new_width, new_height = size_resized(width, height, resize)
    if (width, height) != (new_width, new_height):
        numbers = torch.nn.functional.interpolate(
            planes[None].float(), (new_height, new_width), mode="bilinear", antialias=True, align_corners=False
        )
        planes = numbers[0].round().clamp(0, 255).to(torch.uint8)
    top, left = crop_start(new_height, crop), crop_start(new_width, crop)
    if top < 0 or left < 0:
        planes = torch.nn.functional.pad(planes, (max(0, -left), crop, max(0, -top), crop))
        top, left = max(0, top), max(0, left)
    return planes[:, top : top + crop, left : left + crop].permute(1, 2, 0).contiguous()
