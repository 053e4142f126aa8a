"""Pictures that go to an accelerator as bytes: for which networks, and the proof that it makes the same numbers.

A handler whose pictures become numbers in pyserve's own way leaves the last step, which is the same for each pixel, to
the device (`pyserve.handlers.pixels`). Nothing changes on a CPU.
"""

from __future__ import annotations

import logging

import torch

from pyserve.errors import is_memory_error
from pyserve.handlers.pixels import every_byte
from pyserve.handlers.vision_handler import VisionHandler
from pyserve.lanes.network import Network
from pyserve.torch_error import cause_of

log = logging.getLogger(__name__)

# Numbers of pictures are a few units; this is what rounding the three operations otherwise may come to.
DIFFERENCE_MAX = 1e-6


def choose_pixels(network: Network) -> None:
    """Has the handler of ``network``, which is not loaded yet, make bytes of pictures if the device can go on there."""
    handler, item = network.handler, network.example[0]
    is_picture = item.dim() == 4 and item.shape[1] == 3 and item.dtype is torch.float32
    if network.device != "cpu" and isinstance(handler, VisionHandler) and len(network.example) == 1 and is_picture:
        network.pixels = handler.send_pixels()


def prove_pixels(network: Network) -> None:
    """Tries all that there is to normalise, 256 values of three channels, on the device, and compares with the host's.

    Where that is another number, or fails, pictures go up as numbers.
    """
    if network.pixels is None:
        return
    assert isinstance(network.handler, VisionHandler)
    bytes_ = every_byte()
    try:
        (on_device,) = network.on_device([bytes_])
        difference = (
            (network.torch_model.numbers_of(on_device).cpu() - network.pixels.numbers(bytes_)).abs().max().item()
        )
    except Exception as error:  # torch's, of many classes
        if is_memory_error(error):
            raise
        reason = f"the device cannot make numbers of them: {cause_of(str(error)) or type(error).__name__}"
    else:
        if difference <= DIFFERENCE_MAX:
            network.findings["pixels"] = "bytes, normalized on the device: " + (
                "the same numbers" if difference == 0 else f"numbers that differ by {difference:.1e} at most"
            )
            return
        reason = f"the device makes numbers of them that differ by {difference:.1e}"
    network.handler.keep_numbers()
    network.pixels = None
    network.findings["pixels"] = f"numbers: {reason}"
    log.warning("%s: pictures are copied to %s as numbers, since %s",
                network.context.model_name, network.device, reason)  # fmt: skip


def choose_jpeg_decoder(network: Network, wanted: str | None) -> None:
    """Has the accelerator decode JPEG if ``jpegDecoder`` in model-config.yaml, which is ``wanted``, says so.

    Raises:
        ModelLoadError: it says so, and there is no torchvision that could.
    """
    if wanted != "torchvision":
        return
    handler, name = network.handler, network.context.model_name
    device = torch.device(network.device)
    if network.pixels is not None and isinstance(handler, VisionHandler) and handler.decode_jpeg_on(device):
        network.findings["jpegDecoder"] = f"torchvision on {network.device}; its pixels differ from Pillow's"
        return
    log.warning("%s: Pillow decodes JPEG, whatever jpegDecoder says: it is for image_classifier and image_segmenter on "
                "an accelerator, whose pictures go there as bytes", name)  # fmt: skip
