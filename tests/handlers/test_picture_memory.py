"""Decoded pictures share one budget of memory; grey ones take a quarter of it and become the same numbers."""

from __future__ import annotations

import io
import threading
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pyserve.errors import InputError, OverloadedError
from pyserve.handlers import image, picture_memory
from pyserve.handlers.image import ImageNetTransform, RgbTransform, open_picture, opened_picture, to_rgb
from pyserve.handlers.picture_memory import PictureMemory, limits_as_environment
from pyserve.handlers.vision_handler import VisionHandler


def png(mode: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def test_pictures_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of 100 x 100 pixels in RGB, where two have room."""
    memory = PictureMemory(2 * 100 * 100 * 4)
    monkeypatch.setattr(image, "MEMORY", memory)
    handler, made, together, most = VisionHandler(), [], [0], [0]
    lock = threading.Lock()
    pairs = threading.Barrier(2)

    def process(picture: Image.Image) -> None:
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        pairs.wait(30)  # so that two are there at once
        with lock:
            together[0] -= 1
            made.append(picture.size)

    process.working_size = lambda mode: 0  # type: ignore[attr-defined]
    handler.image_processing = process  # type: ignore[assignment]
    threads = [threading.Thread(target=handler._processed, args=(png("RGB", (100, 100)),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(made) == 8
    assert most[0] == 2
    assert memory.peak == memory.size_max
    assert memory.size == 0


def test_one_that_takes_more_than_all_runs_alone() -> None:
    memory = PictureMemory(10)
    with memory.taken(1000):
        assert memory.size == 10
    assert memory.size == 0


def test_who_waits_first_goes_first() -> None:
    memory = PictureMemory(10)
    order: list[int] = []

    def take(number: int, size: int) -> None:
        with memory.taken(size):
            order.append(number)

    with memory.taken(6):
        threads = []
        for number, size in ((1, 10), (2, 1)):  # the second alone would fit now
            threads.append(threading.Thread(target=take, args=(number, size)))
            threads[-1].start()
            while len(memory._waiting) < number:
                time.sleep(0.001)
    for thread in threads:
        thread.join(60)
    assert order == [1, 2]


def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_memory, "WAIT_MAX_S", 0.0)
    memory = PictureMemory(10)
    with memory.taken(10), pytest.raises(OverloadedError, match="max_image_memory=10"), memory.taken(1):
        pass
    with memory.taken(10):  # nothing of it is left
        pass


def test_a_picture_that_never_fits_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    file = png("L", (200, 200))
    monkeypatch.setattr(image, "MEMORY", PictureMemory(1000))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    refused = pytest.raises(InputError, match=r"40000 bytes once decoded, the limit is max_image_memory=1000")
    with refused, opened_picture(file, None):
        pass


def test_a_damaged_picture_gives_its_room_back(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = PictureMemory(1 << 20)
    monkeypatch.setattr(image, "MEMORY", memory)
    with pytest.raises(InputError), opened_picture(png("RGB", (50, 50))[:-30], None):
        pass
    assert memory.peak
    assert memory.size == 0


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_is_resized_as_grey_and_gives_the_same_numbers(mode: str) -> None:
    source = np.random.default_rng(5)
    transform = ImageNetTransform()
    for _ in range(40):
        height, width = (int(each) for each in source.integers(2, 700, 2))
        if max(height, width) > 20 * min(height, width):
            continue
        picture = Image.fromarray(source.integers(0, 256, (height, width), np.uint8)).convert(mode)
        assert transform(picture).equal(transform(to_rgb(picture)))


def test_transforms_say_what_they_take() -> None:
    assert ImageNetTransform().working_size("RGB") == 0
    assert ImageNetTransform().working_size("L") == 0
    assert ImageNetTransform().working_size("RGBA") == 4
    assert RgbTransform().working_size("RGB") == 15


def test_limits_come_from_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in limits_as_environment(123, 456).items():
        monkeypatch.setenv(name, value)
    assert picture_memory.pixel_count_max(7) == 123
    assert picture_memory._from_environment("PYSERVE_MAX_IMAGE_MEMORY", 7) == 456


def test_a_damaged_picture_is_not_kept() -> None:
    file = io.BytesIO()
    Image.new("RGB", (500, 500), 7).save(file, "PNG")
    opened: list[Image.Image] = []
    open_file = Image.open

    def noting(*args: Any, **options: Any) -> Image.Image:
        opened.append(open_file(*args, **options))
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", noting)
        with pytest.raises(InputError, match="truncated"):
            open_picture(file.getvalue()[:-200])
    with pytest.raises(ValueError, match="closed"):
        opened[0].getpixel((0, 0))
