"""Where decoding JPEG on the device pays: Pillow in threads beside torchvision's decoder for lists."""

from __future__ import annotations

import functools
import io
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image

from bench.gpu_steps import device as on_device
from bench.gpu_steps.settings import Emit, Lacks, Settings
from pyserve.models.sample import write_sample_picture


def run(settings: Settings, emit: Emit) -> None:
    """Pictures/s, each way in a row."""
    body = write_sample_picture(settings.folder / "picture.jpg").read_bytes()
    seconds = 0.1 if settings.tiny else 1.0
    threads = os.cpu_count() or 1
    for count in sorted({1, threads}):
        with ThreadPoolExecutor(count) as pool:
            rate = rate_of(functools.partial(decode_in, pool, [body] * 8 * count), 8 * count, seconds)
        emit({"way": f"Pillow, {count} threads", "pictures_per_s": round(rate, 1), "bytes": len(body)})
    device = on_device.accelerator()
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        raise Lacks("torchvision") from None
    if device.type != "cuda":
        raise Lacks(f"a JPEG decoder for {device.type}")
    data = torch.frombuffer(bytearray(body), dtype=torch.uint8)
    for count in (1, 32, 256):

        def decode_all(count: int = count) -> None:
            decode_jpeg([data] * count, mode=ImageReadMode.RGB, device=device)
            on_device.synchronize(device)

        decode_all()
        emit(
            {"way": f"on the device, lists of {count}", "pictures_per_s": round(rate_of(decode_all, count, seconds), 1)}
        )


def decode_in(pool: ThreadPoolExecutor, bodies: list[bytes]) -> None:
    list(pool.map(decode, bodies))


def decode(body: bytes) -> None:
    Image.open(io.BytesIO(body)).convert("RGB").load()


def rate_of(call: Callable[[], object], items: int, seconds: float) -> float:
    """Items/s of a call that handles ``items``."""
    call()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds or count == 0:
        call()
        count += 1
    return count * items / (time.perf_counter() - began)
