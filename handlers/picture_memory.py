"""How much memory decoded pictures may take, all threads together: a file of kilobytes can hold a picture of 300 MB.

A picture is counted while it is decoded and made a tensor. One that finds no room waits for others to be done, and the
first to wait goes first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections import deque
from collections.abc import Iterator

from pyserve.errors import OverloadedError

SIZE_MAX_DEFAULT = 1 << 30
# Others' pictures are decoded in seconds; who has waited for longer is refused.
WAIT_MAX_S = 30.0

# Bytes of a picture after which the allocator is asked to give back what it keeps, which takes milliseconds: it would
# keep as much for each thread.
TRIM_MIN = 32 << 20
_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda padding: 0)  # only glibc has it

# Bytes of a pixel as Pillow keeps it; 4 in all other modes.
_PIXEL_SIZES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}


class PictureMemory:
    """Bytes of pictures that are being decoded. Any thread.

    Args:
        size_max: bytes that they may take together.

    Attributes:
        size: bytes that are taken.
        peak: the most that was.
    """

    def __init__(self, size_max: int):
        self.size_max = size_max
        self.size = self.peak = 0
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Takes ``size`` bytes for the block, or all there are if it is more.

        Raises:
            OverloadedError: there was no room in WAIT_MAX_S.
        """
        size = min(size, self.size_max)
        with self._changed:
            if self._waiting or self.size + size > self.size_max:
                self._wait_for(size)
            self.size += size
            self.peak = max(self.peak, self.size)
        try:
            yield
        finally:
            if size >= TRIM_MIN:
                _trim(0)
            with self._changed:
                self.size -= size
                if self._waiting:
                    self._changed.notify_all()

    def _wait_for(self, size: int) -> None:
        turn = object()
        self._waiting.append(turn)
        try:
            has_room = self._changed.wait_for(
                lambda: self._waiting[0] is turn and self.size + size <= self.size_max, WAIT_MAX_S
            )
        finally:
            self._waiting.remove(turn)
            self._changed.notify_all()  # the next one may fit, too
        if not has_room:
            raise OverloadedError(
                f"decoded pictures in memory would pass the limit of max_image_memory={self.size_max} bytes; try again "
                "later",
                detail={"reason": "picture memory", "max_image_memory": self.size_max},
                headers={"Retry-After": "1"},
            )


def pixel_size(mode: str) -> int:
    """Bytes of a pixel of a Pillow image."""
    return _PIXEL_SIZES.get(mode, 4)


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else default


def limits_as_environment(pixel_count_max: int, size_max: int) -> dict[str, str]:
    """What worker processes read their limits from."""
    return {"PYSERVE_MAX_IMAGE_PIXELS": str(pixel_count_max), "PYSERVE_MAX_IMAGE_MEMORY": str(size_max)}


def pixel_count_max(default: int) -> int:
    """Of one picture, as the environment says."""
    return _from_environment("PYSERVE_MAX_IMAGE_PIXELS", default)


# Of this process.
MEMORY = PictureMemory(_from_environment("PYSERVE_MAX_IMAGE_MEMORY", SIZE_MAX_DEFAULT))
