"""Which of the driver's GPUs torch counts as ``cuda:0``, ``cuda:1`` ..., found out without initialising CUDA.

The driver counts all GPUs, by their place on the bus. CUDA counts those that ``CUDA_VISIBLE_DEVICES`` leaves, in its
order, and all of them by speed if nothing is set. Both know a GPU's UUID.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

ORDER = "CUDA_DEVICE_ORDER"
VISIBLE = "CUDA_VISIBLE_DEVICES"


class DriverGpu(NamedTuple):
    """A GPU as the driver's library names it.

    Attributes:
        uuid: ``GPU-...``.
        model: such as ``NVIDIA H200``.
        parts: UUIDs of its MIG devices (``MIG-...``); None if it is not divided.
    """

    uuid: str
    model: str = ""
    parts: Sequence[str] | None = None


def visible_gpus(gpus: Sequence[DriverGpu], environ: Mapping[str, str]) -> list[str]:
    """The UUIDs of what CUDA counts, in its order.

    Args:
        gpus: all of them, in the driver's order.

    Raises:
        LookupError: that cannot be known from outside of CUDA; the text says what to set.
    """
    wanted = environ.get(VISIBLE)
    if wanted is not None and wanted.startswith(("GPU-", "MIG-")):
        return _by_uuid(wanted.split(","), [*(gpu.uuid for gpu in gpus), *_parts(gpus)])
    if len({gpu.model for gpu in gpus}) > 1 and environ.get(ORDER) != "PCI_BUS_ID":
        raise LookupError(f"the GPUs are of different models, which CUDA counts by speed: set {ORDER}=PCI_BUS_ID")
    if any(gpu.parts is not None for gpu in gpus):
        if len(gpus) > 1:
            raise LookupError(f"a GPU is divided: name its parts, such as {VISIBLE}=MIG-...")
        return list(_parts(gpus))[:1]  # of a GPU's parts, CUDA takes the first
    every = [gpu.uuid for gpu in gpus]
    return every if wanted is None else [every[place] for place in _places(wanted, len(every))]


def _parts(gpus: Sequence[DriverGpu]) -> list[str]:
    return [part for gpu in gpus for part in gpu.parts or ()]


def _by_uuid(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names may be cut short. The first that does not exist ends the list, and one that comes twice empties it."""
    found: list[str] = []
    for name in wanted:
        matching = [each for each in known if each.startswith(name.strip())]
        if len(matching) != 1:
            break
        if matching[0] in found:
            return []
        found += matching
    return found


def _places(wanted: str, count: int) -> list[int]:
    """As `_by_uuid`, of numbers; CUDA reads the digits that a word begins with."""
    found: list[int] = []
    for word in wanted.split(","):
        digits = ""
        for character in word.strip():
            if character not in "0123456789":
                break
            digits += character
        if not digits or int(digits) >= count:
            break
        if int(digits) in found:
            return []
        found.append(int(digits))
    return found
