"""Something to send to a model, kept as a file, so that the start-up table can end with a line that works as pasted."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import torch
from PIL import Image

from pyserve.archive.archive import Archive
from pyserve.archive.samples import archive_samples
from pyserve.handler import Handler
from pyserve.lanes.lane import Lane
from pyserve.lanes.native import NativeLane


def sample_arguments(name: str, handler: Handler, example: list[torch.Tensor], folder: Path) -> str:
    """Arguments for curl that post a sample input of model ``name``; the file is written into ``folder``.

    Args:
        example: one item, [1, ...] per input.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if handler.sample_kind == "picture":
        path = folder / "sample.jpg"
        if not path.exists():
            write_sample_picture(path)
        return f"-T {shlex.quote(str(path))}"
    path = folder / f"{name}.json"
    values = [each[0].tolist() for each in example]
    names = [spec.name for spec in getattr(handler, "specs", ())]
    path.write_text(json.dumps(values[0] if len(values) == 1 else dict(zip(names, values, strict=True))))
    return f"-H 'Content-Type: application/json' -T {shlex.quote(str(path))}"


def packed_sample_arguments(archive: Archive, folder: Path) -> str:
    """Arguments for curl that post the sample that ``archive`` brings along; ``-T FILE`` if it has none: what a handler
    of its own understands is its own business."""  # fmt: skip
    sample = next(iter(archive_samples(archive.model_dir)), None)
    if sample is None:
        return "-T FILE"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / sample.name
    path.write_bytes(sample.body)
    return f"-H 'Content-Type: {sample.content_type}' -T {shlex.quote(str(path))}"


def arguments_for(name: str, archive: Archive, lane: Lane | None, folder: Path) -> str:
    """Arguments of a curl call that sends something the model understands; the file is put into ``folder``.

    REQUIRES: the model is READY.
    """
    if not isinstance(lane, NativeLane):
        return packed_sample_arguments(archive, folder)
    return sample_arguments(name, lane.network.handler, lane.network.example, folder)


PICTURE_NAME = "sample.jpg"


def write_sample_picture(path: Path) -> Path:
    """Draw a kitten on a meadow into a JPEG of 400 x 300 pixels, always the same one; returns ``path``."""
    import numpy as np
    from PIL import Image, ImageChops

    path.parent.mkdir(parents=True, exist_ok=True)
    scale = 2  # drawn twice as large: scaling down smooths the edges
    scene = Image.new("RGB", (400 * scale, 300 * scale))
    _draw_kitten(scene)
    picture = scene.resize((400, 300), Image.Resampling.BOX)
    # Grain, as a camera has it, so that decoding costs what it costs for a photo.
    grain = np.random.Generator(np.random.PCG64(0)).integers(0, 16, (300, 400, 1), dtype=np.uint8)
    picture = ImageChops.add(picture, Image.fromarray(grain.repeat(3, axis=2)))
    picture.save(path, "JPEG", quality=90)
    return path


def _draw_kitten(scene: Image.Image) -> None:
    """Coordinates are in hundredths of the picture's height, from its centre."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(scene)
    width, height = scene.size
    for y in range(height):
        share = y / height
        sky, grass = (120 + int(110 * share), 180 + int(40 * share), 230), (60, 150 - int(70 * share), 50)
        draw.line((0, y, width, y), fill=sky if share < 0.62 else grass)

    def at(x: float, y: float) -> tuple[float, float]:
        return width / 2 + x * height / 100, height / 2 + y * height / 100

    def oval(x: float, y: float, wide: float, high: float, colour: str) -> None:
        draw.ellipse((*at(x - wide, y - high), *at(x + wide, y + high)), fill=colour)

    fur, stripe, pale = "#c8864a", "#8a5524", "#f4dcc0"
    draw.arc((*at(10, 0), *at(52, 44)), 260, 90, fill=fur, width=height // 18)  # tail
    oval(0, 34, 28, 24, fur)  # body
    oval(0, 38, 15, 18, pale)
    for side in (-1, 1):
        oval(12 * side, 46, 8, 5, pale)  # paw
        draw.polygon([at(27 * side, -40), at(6 * side, -24), at(26 * side, -8)], fill=fur)  # ear
        draw.polygon([at(24 * side, -33), at(11 * side, -22), at(23 * side, -12)], fill="#e8a8a0")
    oval(0, -6, 27, 23, fur)  # head
    for x in (-8, 0, 8):
        draw.line((*at(x, -28 + abs(x) / 4), *at(x * 0.7, -18)), fill=stripe, width=height // 60)
    oval(0, 5, 13, 9, pale)  # muzzle
    for side in (-1, 1):
        oval(11 * side, -8, 6, 6.5, "#e9f2c0")
        oval(11 * side, -8, 2.6, 6, "#1c2413")
        oval(11 * side + 1.5, -10.5, 1.2, 1.2, "white")
        draw.arc((*at(3 * side - 3, 3), *at(3 * side + 3, 9)), 0, 180, fill=stripe, width=height // 150)
        for angle in (-0.12, 0.06, 0.24):
            end = at(side * (14 + 24 * math.cos(angle)), 5 + 24 * math.sin(angle))
            draw.line((*at(8 * side, 5 + angle * 8), *end), fill="white", width=height // 200)
    draw.polygon([at(-3, 0), at(3, 0), at(0, 4)], fill="#d07070")  # nose
