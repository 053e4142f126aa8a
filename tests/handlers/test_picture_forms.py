"""Pictures in the forms that people send: base64 in an object, as phones take them, and turned by EXIF."""

from __future__ import annotations

import base64
import io
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pyserve.archive.model_config import ModelConfig
from pyserve.context import Context
from pyserve.handler import InputError
from pyserve.handlers import image
from pyserve.handlers.image import MEMORY, open_picture, opened_picture, orientation, upright
from pyserve.handlers.image_classifier import ImageClassifier
from tests.support import serving_models
from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, Server

# Each pixel another one, so that no two of the eight ways to lie are alike.
PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) * 2
# Orientation -> what of the stored rows and columns is upright (CIPA DC-008, 4.6.5: where the 0th row and column are).
UPRIGHT = {
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}  # fmt: skip
GIVEN: Any = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)


def file_of(pixels: Any, kind: str = "PNG", turn: int | None = None) -> bytes:
    picture, file = Image.fromarray(pixels), io.BytesIO()
    exif = Image.Exif()
    if turn is not None:
        exif[0x0112] = turn
    picture.save(file, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


def handler_with(**config: Any) -> ImageClassifier:
    handler = ImageClassifier()
    handler.prepare(Context("m", "/", {}, model_yaml_config=config))
    return handler


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_each_orientation_is_turned_upright_without_a_change_of_pixels(turn: int, kind: str) -> None:
    file = file_of(PIXELS, kind, turn)
    stored = np.asarray(open_picture(file))
    with opened_picture(file, None, exif=True) as picture:
        assert np.array_equal(np.asarray(picture), UPRIGHT[turn](stored))
        assert picture.tobytes() == ImageOps.exif_transpose(open_picture(file)).tobytes()
    assert kind != "PNG" or np.array_equal(stored, PIXELS)
    with opened_picture(file, None) as picture:
        assert np.array_equal(np.asarray(picture), stored), "by default as it lies, as in TorchServe"
    assert MEMORY.size == 0


@pytest.mark.parametrize("turn", range(1, 9))
def test_pillow_itself_turns_tiff(turn: int) -> None:
    for exif in (True, False):
        with opened_picture(file_of(PIXELS, "TIFF", turn), None, exif=exif) as picture:
            assert np.array_equal(np.asarray(picture), UPRIGHT[turn](PIXELS))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16", "I", "F", "LA"])
def test_pictures_of_every_mode_can_be_turned(mode: str) -> None:
    picture = Image.new(mode, (3, 2))
    picture.getexif()[0x0112] = 6
    assert upright(picture).size == (2, 3)


@pytest.mark.parametrize("value", [0, 9, -1, 65535, "x", (1, 2), None])
def test_an_orientation_that_there_is_not_turns_nothing(value: Any) -> None:
    picture = Image.new("L", (3, 2))
    picture.getexif()[0x0112] = value
    assert orientation(picture) == 1 and upright(picture) is picture


def test_damaged_exif_turns_nothing() -> None:
    good = bytearray(file_of(PIXELS, "JPEG", 6))
    at = good.index(b"Exif\0\0")
    for damage in (b"\xff" * 20, b"II*\0\xff\xff\xff\xff"):
        file = bytearray(good)
        file[at + 6 : at + 6 + len(damage)] = damage
        with opened_picture(file, None, exif=True) as picture:
            assert picture.size == (7, 5)


def test_a_handler_turns_pictures_only_if_the_archive_says_so() -> None:
    for turn in range(1, 9):
        file = file_of(GIVEN, "PNG", turn)
        turned = handler_with().preprocess([{"body": file_of(np.ascontiguousarray(UPRIGHT[turn](GIVEN)))}])
        assert handler_with(exif=True).preprocess([{"body": file}]).equal(turned)
        plain = handler_with().preprocess([{"body": file_of(GIVEN)}])
        for config in ({}, {"exif": False}):
            assert handler_with(**config).preprocess([{"body": file}]).equal(plain)


def test_exif_is_yes_or_no() -> None:
    assert ModelConfig.parse(b"exif: true\n", "m.mar").exif is True
    [warning] = ModelConfig.parse(b"exif: sometimes\n", "m.mar").warnings
    assert "exif must be true or false" in warning
    assert handler_with(exif="true")._applies_exif and not handler_with(exif="sometimes")._applies_exif


def test_base64_in_an_object_is_the_picture() -> None:
    file = file_of(GIVEN)
    expected = handler_with().preprocess([{"body": file}])
    text = base64.b64encode(file).decode()
    for value in (text, {"data": text}, {"b64": text}, {"data": "data:image/png;base64," + text}):
        assert handler_with().preprocess([{"body": value}]).equal(expected)
    for value in ({"url": "http://x/y.jpg"}, {"data": text, "top": 3}, {"data": {"data": text}}):
        with pytest.raises(InputError, match="got a JSON object with"):
            handler_with().preprocess([{"body": value}])


def test_heic_is_decoded_where_pillow_heif_is_installed() -> None:
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    smooth = np.ascontiguousarray(np.indices((48, 64)).sum(0).astype(np.uint8)[..., None].repeat(3, 2))
    heif.from_pillow(Image.fromarray(smooth)).save(file, quality=100)
    picture = open_picture(file.getvalue())
    assert picture.size == (64, 48) and np.abs(np.asarray(picture).astype(int) - smooth).max() <= 6
    for damaged in (file.getvalue()[:200], file.getvalue()[:-400]):
        with pytest.raises(InputError):
            open_picture(damaged)


def test_heic_is_named_with_what_to_install_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "_heif_format", lambda: ())
    start = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic"
    with pytest.raises(
        InputError, match="a HEIC picture, as phones take them; convert it to JPEG, or have pillow-heif"
    ):
        open_picture(start)
    monkeypatch.setattr(image, "_heif_format", lambda: ("HEIF",))
    with pytest.raises(InputError, match=r"convert it to JPEG$|damaged"):
        open_picture(start)


# --- both lanes, as clients meet them ---------------------------------------------------------------------------------

OWN = """
from ts.torch_handler.image_classifier import ImageClassifier


class Own(ImageClassifier):
    pass
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("forms"))
    for exif in (True, False):
        suffix = "turned" if exif else "plain"
        serving_models.write_torchscript(
            server.store,
            serving_models.Pictures(),
            f"native_{suffix}",
            handler="image_classifier",
            config={"exif": exif},
        )
        write_handler(server.store, f"python_{suffix}", OWN, network=serving_models.Pictures(), config={"exif": exif})
    serving_models.write_linear(server.store)
    server.start("--models", "all")
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.server
@pytest.mark.parametrize("lane", ["native", "python"])
def test_both_lanes_turn_pictures_alike(server: Server, lane: str) -> None:
    assert server.ask("GET", f"/models/{lane}_turned", port="management").json[0]["lane"] == lane
    stored = server.ask("POST", f"/predictions/{lane}_plain", file_of(GIVEN)).json
    for turn in range(1, 9):
        file = file_of(GIVEN, "PNG", turn)
        right = server.ask(
            "POST", f"/predictions/{lane}_plain", file_of(np.ascontiguousarray(UPRIGHT[turn](GIVEN)))
        ).json
        assert server.ask("POST", f"/predictions/{lane}_turned", file).json == pytest.approx(right, abs=1e-6)
        assert server.ask("POST", f"/predictions/{lane}_plain", file).json == pytest.approx(stored, abs=1e-6)
        in_object = b'{"data": "%s"}' % base64.b64encode(file)
        assert server.ask("POST", f"/predictions/{lane}_turned", in_object, JSON).json == pytest.approx(right, abs=1e-6)


@pytest.mark.server
def test_an_array_of_numpys_is_answered_as_its_numbers_are(server: Server) -> None:
    values = np.float32([0.5, -1, 2, 3])
    right = server.ask("POST", "/predictions/linear", b"[0.5, -1, 2, 3]", JSON).json
    file = io.BytesIO()
    np.save(file, values.astype(">f4"))
    for headers in ({}, {"content-type": "application/octet-stream"}):
        answer = server.ask("POST", "/predictions/linear", file.getvalue(), headers)
        assert struct.unpack("<3f", answer.body) == pytest.approx(right) and answer.headers["x-tensor-shape"] == "3"
    for data in (values.tobytes(), file.getvalue()):
        body = b'{"data": "%s"}' % base64.b64encode(data)
        assert server.ask("POST", "/predictions/linear", body, JSON).json == pytest.approx(right)
    form = b'--b\r\nContent-Disposition: form-data; name="data"\r\n\r\n[0.5, -1, 2, 3]\r\n--b--\r\n'
    answer = server.ask("POST", "/predictions/linear", form, {"content-type": "multipart/form-data; boundary=b"})
    assert answer.json == pytest.approx(right)


def test_many_comments_are_looked_at_once() -> None:
    code = "from pyserve.handlers.image import _kind_found as kind\n" \
        "body = b'<!---->' * 140\nprint(kind(body)[:9], kind(body + b'<svg>')[:3])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "980 bytes SVG\n"
