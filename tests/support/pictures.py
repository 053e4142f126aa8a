"""Picture files of every kind that handlers read, made of random numbers."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image

SEED = int(os.environ.get("PYSERVE_TEST_SEED", "33"))

# Mode -> a format that keeps it.
MODES = {
    "RGB": "PNG", "L": "PNG", "1": "PNG", "P": "PNG", "LA": "PNG", "RGBA": "PNG", "CMYK": "JPEG", "I;16": "PNG",
    "YCbCr": "JPEG",
}  # fmt: skip
SIZES = ((224, 224), (400, 300), (31, 17), (1, 1), (257, 259), (640, 90))


def picture_file(mode: str, size: tuple[int, int], seed: int, *, orientation: int = 0) -> bytes:
    """A picture of that mode, as a file; with EXIF's word on how to turn it, if there is one."""
    random = np.random.default_rng([SEED, seed])
    width, height = size
    if mode == "I;16":
        picture = Image.fromarray(random.integers(0, 65536, (height, width), dtype=np.uint16))
    else:
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, MODES[mode], **({"exif": exif} if orientation else {}))
    return file.getvalue()


def picture_files() -> Iterator[bytes]:
    """One of every mode in every size, some of which say how they lie."""
    print(f"PYSERVE_TEST_SEED={SEED}")
    for number, (mode, size) in enumerate((mode, size) for mode in MODES for size in SIZES):
        yield picture_file(mode, size, number, orientation=number % 9 if mode != "I;16" else 0)
