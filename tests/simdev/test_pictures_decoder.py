"""JPEG decoded on the device: what is asked of torchvision, played here by a stand-in, and what is made of it."""

from __future__ import annotations

import io
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyserve.errors import ModelLoadError
from pyserve.handler import InputError
from pyserve.handlers.device_jpeg import FILES_MAX, DeviceJpeg, square_of
from pyserve.handlers.image import ImageNetTransform
from tests.simdev.test_pictures_lane import Classes, answers_of, close, network_of
from tests.support.lane_stand import run
from tests.support.pictures import picture_file

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")
RGB = object()


class Torchvision:
    """``torchvision.io``, as far as it is asked: Pillow decodes, the planes are copied to the device."""

    def __init__(self) -> None:
        self.lists: list[int] = []
        self.may_decode = threading.Event()
        self.may_decode.set()

    def decode_jpeg(self, files: list[torch.Tensor], *, mode: object, device: torch.device) -> list[torch.Tensor]:
        assert mode is RGB and all(each.dtype is torch.uint8 and each.dim() == 1 for each in files)
        self.lists.append(len(files))
        self.may_decode.wait(60)
        planes = []
        for file in files:
            with Image.open(io.BytesIO(file.numpy().tobytes())) as picture:
                try:
                    pixels = np.array(picture.convert("RGB"))
                except OSError as error:
                    raise RuntimeError("nvJPEG: bad JPEG") from error
            planes.append(torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(device))
        return planes


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> Torchvision:
    fake = Torchvision()
    module: Any = types.ModuleType("torchvision.io")
    module.decode_jpeg, module.ImageReadMode = fake.decode_jpeg, types.SimpleNamespace(RGB=RGB)
    package: Any = types.ModuleType("torchvision")
    package.io = module
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.io", module)
    return fake


def jpeg(size: tuple[int, int], mode: str = "RGB") -> bytes:
    """A smooth one."""
    coarse = Image.open(io.BytesIO(picture_file("RGB", (7, 5), sum(size))))
    file = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.mark.parametrize(
    "size", [(224, 224), (256, 256), (400, 300), (300, 400), (31, 17), (1, 1), (257, 259), (640, 90)]
)
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (20, 32), (33, 40)])
def test_squares_are_cut_out_where_pillow_cuts_them(size: tuple[int, int], resize: int, crop: int) -> None:
    picture = Image.open(io.BytesIO(jpeg(size)))
    planes = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    wanted = ImageNetTransform(resize, crop).pixels(picture)
    got = square_of(planes, resize, crop)
    assert got.shape == wanted.shape and got.is_contiguous()
    assert (got.int() - wanted.int()).abs().max() <= 2
    assert torch.equal((got == 0).all(-1), (wanted == 0).all(-1)) or crop <= resize


def test_files_that_come_together_are_decoded_as_one_list(torchvision: Torchvision, simdev: Any) -> None:
    decoder, files = DeviceJpeg(torch.device("simdev:0")), [jpeg((40 + number, 30)) for number in range(6)]
    torchvision.may_decode.clear()
    with ThreadPoolExecutor(6) as pool:
        made = [pool.submit(decoder.decoded, file, lambda planes: planes * 1) for file in files]
        while len(decoder._waiting) < 5:  # the first of them is being decoded
            pass
        torchvision.may_decode.set()
        planes = [each.result() for each in made]
    assert torchvision.lists == [1, 5] and FILES_MAX > 5
    for file, each in zip(files, planes, strict=True):
        assert each is not None and each.device.type == "simdev"
        assert torch.equal(each.cpu(), torch.from_numpy(np.array(Image.open(io.BytesIO(file)))).permute(2, 0, 1))


def test_damaged_file_of_a_list_does_not_harm_the_others(torchvision: Torchvision, simdev: Any) -> None:
    decoder = DeviceJpeg(torch.device("simdev:0"))
    good, bad = jpeg((40, 30)), jpeg((400, 300))[:2000]
    torchvision.may_decode.clear()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(decoder.decoded, good, torch.clone)
        while not torchvision.lists:
            pass
        others = [pool.submit(decoder.decoded, file, torch.clone) for file in (bad, good)]
        while len(decoder._waiting) < 2:
            pass
        torchvision.may_decode.set()
        made = [each.result() for each in (first, *others)]
    assert [each is None for each in made] == [False, True, False]
    assert decoder.decoded(picture_file("RGB", (9, 9), 1), torch.clone) is None  # a PNG
    assert torchvision.lists == [1, 2, 1, 1]


def test_answers_of_a_model_whose_pictures_the_device_decodes(
    tmp_path: Path, torchvision: Torchvision, simdev: Any
) -> None:
    bodies: list[Any] = [jpeg((300, 260)), jpeg((300, 260), "L"), jpeg((280, 300), "CMYK"), torch.randn(1, 3, 224, 224)]
    bodies += [picture_file("RGBA", (300, 300), 1), *(jpeg((256 + number, 256)) for number in range(12))]
    on_cpu = network_of(tmp_path / "cpu", Classes(), "image_classifier", "cpu", jpegDecoder="torchvision")
    assert "jpegDecoder" not in on_cpu.findings
    on_device = network_of(tmp_path / "device", Classes(), "image_classifier", "simdev:0", jpegDecoder="torchvision")
    assert on_device.findings["jpegDecoder"].startswith("torchvision on simdev:0")
    loaded_count = sum(torchvision.lists)
    prepared = on_device.handler.preprocess([{"body": bodies[0]}])
    assert prepared.device.type == "simdev" and prepared.dtype is torch.uint8 and prepared.shape == (1, 224, 224, 3)
    simdev.fault("random seed=5 max_us=300")
    found: list[list[Any]] = []

    async def ask() -> None:
        for network in (on_cpu, on_device):
            found.append(await answers_of(network, bodies))

    run(ask())
    assert sum(torchvision.lists) - loaded_count == 1 + 14  # neither CMYK nor PNG
    for left, right in zip(*found, strict=True):
        assert {name: pytest.approx(value, abs=0.02) for name, value in left.items()} == right or len(left) == 5
    assert close(found[0][2:5], found[1][2:5])


def test_damaged_and_too_large_files_are_refused_in_the_words_for_them(
    tmp_path: Path, torchvision: Torchvision, simdev: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = network_of(tmp_path, Classes(), "image_classifier", "simdev:0", jpegDecoder="torchvision").handler
    with pytest.raises(InputError, match="truncated JPEG"):
        handler.preprocess([{"body": jpeg((400, 300))[:2000]}])
    with pytest.raises(InputError, match="not a picture"):
        handler.preprocess([{"body": b"\xff\xd8\xff" + bytes(50)}])
    with pytest.raises(InputError, match="too long and thin"):
        handler.preprocess([{"body": jpeg((60_000, 1))}])
    before = len(torchvision.lists)
    monkeypatch.setattr("pyserve.handlers.image.PIXEL_COUNT_MAX", 1000)
    with pytest.raises(InputError, match="the limit is 1000"):
        handler.preprocess([{"body": jpeg((400, 300))}])
    assert len(torchvision.lists) == before


def test_without_torchvision_it_is_refused_by_name(
    tmp_path: Path, simdev: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    with pytest.raises(ModelLoadError, match=r"'jpegDecoder: torchvision' in model-config.yaml needs torchvision"):
        network_of(tmp_path, Classes(), "image_classifier", "simdev:0", jpegDecoder="torchvision")
