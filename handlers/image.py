"""Pictures: from bytes to a Pillow image, and from that to the numbers an ImageNet model wants.

The numbers are bit-equal to torchvision's Resize(256), CenterCrop(224), ToTensor and Normalize on a Pillow
image, as its documentation describes them, without needing torchvision. Everything here may run in several
threads at once; Pillow and numpy release the GIL for the long parts.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from pyserve.body_kind import begins_as_json, is_heic
from pyserve.handler import InputError
from pyserve.handlers.picture_memory import MEMORY, pixel_count_max, pixel_size
from pyserve.handlers.pixels import IDENTITY, Normalization
from pyserve.handlers.rows import bytes_of_base64, found

# What a picture may be (JPEG's opener also takes MPO). Formats that Pillow hands to another program, such as
# EPS to Ghostscript, are not among them. A Pillow built without one of these does without.
Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
    if name in Image.OPEN
)

# Pillow only warns between this number of pixels and twice of it; here it is a limit, unless `max_image_pixels` says
# another one. Pillow's own, twice as many, holds beside it.
PIXEL_COUNT_MAX: int = pixel_count_max(Image.MAX_IMAGE_PIXELS or 89_478_485)

# Its warnings quote the client's file: a line in the log, and an entry in a table that never shrinks, for each.
warnings.filterwarnings("ignore", module=r"PIL\.")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip

# 16-bit grey (PNG, TIFF); Pillow's own conversion to RGB would clip everything above 255 to white.
_WIDE_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})


def open_picture(body: bytes | bytearray | memoryview, *, limit_pixels: bool = True) -> Image.Image:
    """Decode a picture file; of one with many frames the first. EXIF orientation is not applied.

    Args:
        body: the file.
        limit_pixels: refuse pictures of more than `PIXEL_COUNT_MAX` pixels, before decoding them.

    Raises:
        InputError: it is not a picture, is damaged, or is too large.
    """
    with opened_picture(body, None, limit_pixels=limit_pixels) as picture:
        return picture


@contextlib.contextmanager
def opened_picture(
    body: bytes | bytearray | memoryview, made_of_it: Any, *, limit_pixels: bool = True, exif: bool = False
) -> Iterator[Image.Image]:
    """As `open_picture`, for a block: as long as it runs the picture counts in the memory of decoded pictures.

    Args:
        made_of_it: what the block makes a tensor with; its ``working_size(mode)`` says how many bytes per pixel that
            takes beside the picture.
        exif: turn it as its EXIF orientation says.

    Raises:
        InputError: as `open_picture`.
        OverloadedError: there was no room for it.
    """
    picture = picture_header(body, limit_pixels=limit_pixels)
    pixel_count, per_pixel = picture.width * picture.height, pixel_size(picture.mode)
    if limit_pixels and pixel_count * per_pixel > MEMORY.size_max:
        picture.close()
        raise InputError(
            f"the picture is too large: {picture.width} x {picture.height} pixels, {pixel_count * per_pixel} bytes "
            f"once decoded, the limit is max_image_memory={MEMORY.size_max}; send a smaller one"
        )
    if made_of_it is not None:
        per_pixel += getattr(made_of_it, "working_size", _working_size)(picture.mode)
    if exif:
        per_pixel += pixel_size(picture.mode)  # turning makes another one
    with MEMORY.taken(pixel_count * per_pixel):
        try:
            picture.load()
        except Exception as error:
            try:
                if isinstance(error, MemoryError):
                    raise
                raise _refusal(picture, body, error) from error
            finally:
                # The error's frames hold the decoder with all that is decoded, as long as anybody has the error.
                traceback.clear_frames(error.__traceback__)
                picture.close()
        if exif:
            picture = upright(picture)
        try:
            yield picture
        finally:
            if hasattr(made_of_it, "working_size"):  # one of these transforms, none of which keeps the picture
                picture.close()  # its memory is free before another one is decoded


def orientation(picture: Image.Image) -> int:
    """1 to 8, as EXIF counts them (CIPA DC-008, 4.6.5); 1, which is upright, if it says nothing that can be used."""
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # of what is damaged, errors of many classes; the pixels are as good as any
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(picture: Image.Image) -> Image.Image:
    """``picture`` turned, and mirrored, as its EXIF orientation says. The one that was given is closed if it was."""
    method = _UPRIGHT.get(orientation(picture))
    if method is None:
        return picture
    turned = picture.transpose(method)
    picture.close()
    return turned


def _working_size(mode: str) -> int:
    """Bytes per pixel that making something of a picture takes, if nothing says how many: one more copy."""
    return 4


def picture_header(body: bytes | bytearray | memoryview, *, limit_pixels: bool) -> Image.Image:
    """A picture that is not decoded yet. InputError as of `open_picture`."""
    try:
        picture = Image.open(io.BytesIO(body), formats=_formats_for(body))
        pixel_count = picture.width * picture.height
        if limit_pixels and pixel_count > PIXEL_COUNT_MAX:
            picture.close()
            raise InputError(
                f"the picture is too large: {picture.width} x {picture.height} = {pixel_count} pixels, "
                f"the limit is {PIXEL_COUNT_MAX}; send a smaller one"
            )
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise _refusal(None, body, error) from error
    return picture


def _formats_for(body: bytes | bytearray | memoryview) -> tuple[str, ...]:
    return (*FORMATS, *_heif_format()) if is_heic(bytes(body[:16])) else FORMATS


@functools.cache
def _heif_format() -> tuple[str, ...]:
    """What Pillow calls HEIC, once pillow-heif has taught it to; nothing where that is not installed."""
    try:
        import pillow_heif
    except ImportError:
        return ()
    # Pictures are decoded in several threads anyway.
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
    return ("HEIF",)


def _refusal(picture: Image.Image | None, body: bytes | bytearray | memoryview, error: Exception) -> InputError:
    """Pillow's decoders raise errors of many classes on damaged files; whatever it was, the file is at fault."""
    if isinstance(error, UnidentifiedImageError):
        return InputError(f"not a picture: {_kind_found(body)}")
    if isinstance(error, Image.DecompressionBombError):
        numbers = re.findall(r"\d+", str(error))
        sizes = f"{numbers[0]} pixels, the limit is {PIXEL_COUNT_MAX}" if numbers else str(error)
        return InputError(f"the picture is too large: {sizes}; send a smaller one")
    return InputError(_damage(picture, body, error))


def picture_from_base64(text: str, *, limit_pixels: bool = True) -> Image.Image:
    """Decode a picture file given as base64 text; a ``data:image/...;base64,`` prefix and line breaks are fine.

    Raises:
        InputError: it is not base64, or not a picture.
    """
    return open_picture(picture_file(text), limit_pixels=limit_pixels)


def picture_file(text: str) -> bytes:
    """What the base64 text of a picture holds.

    Raises:
        InputError: it is not base64.
    """
    decoded = bytes_of_base64(text)
    if decoded is None:
        raise InputError(f"not a picture: expected base64, got {found(text)}")
    return decoded


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture with 8 bits each of red, green and blue; transparency is dropped, 16-bit grey keeps its high byte.

    Raises:
        InputError: its pixels are of a kind without a known range.
    """
    if picture.mode == "RGB":
        return picture
    if picture.mode in _WIDE_MODES:
        grey = np.asarray(picture)
        if grey.min() < 0 or grey.max() > 65535:
            raise InputError("the picture has 32-bit pixels beyond 16 bits; convert it to 8 or 16 bits")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise InputError("the picture has floating-point pixels, whose range is unknown; convert it to 8 bits")
    return picture.convert("RGB")


def size_resized(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height of a picture whose shorter side becomes ``size``, as `resized` has them. InputError as there."""
    short, long = sorted((width, height))
    new_long = int(size * long / short)
    if size * new_long > PIXEL_COUNT_MAX:
        raise InputError(f"the picture is too long and thin: {width} x {height} pixels; crop it first")
    return (size, new_long) if width <= height else (new_long, size)


def resized(picture: Image.Image, size: int) -> Image.Image:
    """Bilinear (antialiased) to ``size`` pixels on the shorter side, the longer one in proportion, rounded down.

    Raises:
        InputError: the picture is so long and thin that the result would be too large.
    """
    new_size = size_resized(picture.width, picture.height, size)
    return picture if picture.size == new_size else picture.resize(new_size, Image.Resampling.BILINEAR)


def center_cropped(picture: Image.Image, size: int) -> Image.Image:
    """The ``size`` x ``size`` pixels at the centre; a side that is shorter is filled up with black."""
    left, top = (crop_start(length, size) for length in picture.size)
    return picture.crop((left, top, left + size, top + size))


def crop_start(length: int, size: int) -> int:
    """Where the ``size`` pixels at the centre of ``length`` begin; negative if there are not as many."""
    # Python's round is to even, as torchvision's; padding puts the odd pixel at the far side.
    return round((length - size) / 2.0) if length >= size else -((size - length) // 2)


class ImageNetTransform:
    """Picture -> float32 tensor [3, crop, crop], what ImageNet classifiers were trained on.

    Args:
        resize: pixels of the shorter side before cropping.
        crop: pixels of both sides after it.
        mean, std: per channel, of values in [0, 1].
    """

    def __init__(
        self,
        resize: int = 256,
        crop: int = 224,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ):
        self.resize = resize
        self.crop = crop
        self.normalization = Normalization.of(mean, std)
        self._mean = np.array(mean, np.float32).reshape(3, 1, 1)
        self._std = np.array(std, np.float32).reshape(3, 1, 1)

    def working_size(self, mode: str) -> int:
        """Bytes per pixel that a call needs beside the picture."""
        return {"RGB": 0, "L": 0, "1": 1}.get(mode, 8 if mode in _WIDE_MODES else 4)

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """One picture of any mode -> its tensor. InputError if its pixels cannot be used."""
        # In numpy: torch would start a thread team of its own in every calling thread.
        channels = np.asarray(self._square(picture)).transpose(2, 0, 1)
        pixels = np.empty((3, self.crop, self.crop), np.float32)
        np.divide(channels, np.float32(255), out=pixels)
        pixels -= self._mean
        pixels /= self._std
        return torch.from_numpy(pixels)

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """As a call, but the bytes [crop, crop, 3] that are not normalised yet."""
        return torch.from_numpy(np.array(self._square(picture)))

    def _square(self, picture: Image.Image) -> Image.Image:
        # Each channel is resized by itself, so of grey one is enough: the same numbers in a quarter of the memory.
        plain = picture if picture.mode == "L" else picture.convert("L") if picture.mode == "1" else to_rgb(picture)
        return to_rgb(center_cropped(resized(plain, self.resize), self.crop))


class RgbTransform:
    """Picture -> float32 tensor [3, height, width] of its red, green and blue, 0 to 1; sizes stay as they are."""

    normalization = IDENTITY

    def working_size(self, mode: str) -> int:
        """Bytes per pixel that a call needs beside the picture: RGB, its bytes and its numbers."""
        return (0 if mode == "RGB" else 4) + 3 + 12

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """One picture of any mode -> its tensor. InputError if its pixels cannot be used."""
        channels = np.asarray(to_rgb(picture)).transpose(2, 0, 1)
        return torch.from_numpy(np.divide(channels, np.float32(255), order="C", dtype=np.float32))

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """As a call, but bytes [height, width, 3]."""
        return torch.from_numpy(np.array(to_rgb(picture)))


# A comment ends at the first place where it can: with more than one way to read them, many take forever.
_SVG = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--((?!-->).)*-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg[\s>]", re.DOTALL)


def _kind_found(body: bytes | bytearray | memoryview) -> str:
    start = bytes(body[:1024])
    if is_heic(start):
        fix = (
            "convert it to JPEG"
            if _heif_format()
            else "convert it to JPEG, or have pillow-heif installed where it is served"
        )
        return f"{found(body)}; {fix}"
    known = "; send one of " + ", ".join(FORMATS)
    if _SVG.match(start):
        return "SVG, which is a drawing, not pixels" + known
    for magic, name in (
        (b"%PDF", "PDF"),
        (b"%!PS", "PostScript"),
        (b"\x1f\x8b", "gzip"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\x93NUMPY", "a numpy file"),
    ):
        if start.startswith(magic):
            return f"{name} ({len(body)} bytes){known}"
    if start.startswith(b"\xff\xd8"):
        return f"damaged JPEG: {found(body)}"
    if start.startswith(b"\x89PNG"):
        return f"damaged PNG: {found(body)}"
    if begins_as_json(start) and not start.lstrip().startswith(b'""'):  # which begins a text of Python
        return f"{found(body)}; a JSON body needs Content-Type: application/json"
    if re.match(rb"\s*--[-\w]+\r\n", start):
        return f"{found(body)}; a multipart form needs its boundary in Content-Type"
    return found(body) + known


def _damage(picture: Image.Image | None, body: bytes | bytearray | memoryview, error: Exception) -> str:
    if picture is None:
        return f"not a picture: {_kind_found(body)} ({error})"
    text = str(error) or type(error).__name__
    truncated = "truncated" in text or "broken data stream" in text or isinstance(error, EOFError)
    word = "truncated" if truncated else "damaged"
    return f"{word} {picture.format} of {len(body)} bytes: {text}"
