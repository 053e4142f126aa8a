"""Where a model runs and with how many workers, when nothing else was asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pyserve import devices
from pyserve.archive.model_config import ModelConfig
from pyserve.errors import InvalidModelError
from pyserve.telemetry.nvml import free_memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resident:
    """A model that is served or being loaded.

    Attributes:
        devices: that its workers use.
        coming_size: bytes that it is going to need on each of them, which nobody else has seen taken yet.
    """

    devices: tuple[str, ...]
    coming_size: int = 0


def gpu_count(most: int | None) -> int:
    """Accelerators that torch can use, at most ``most`` (None: all)."""
    count = devices.count()
    return count if most is None else min(count, most)


def free_bytes(index: int) -> int | None:
    """Of an accelerator, asked in a way that makes no context on it; None if there is none."""
    found = free_memory(index) if devices.kind() == "cuda" else devices.memory(index)
    return None if found is None else found[0]


def allowed_devices(config: ModelConfig, gpus: int, *, label: str, is_lenient: bool = False) -> list[int]:
    """The accelerators that a model may use, in the order of ``deviceIds``; none if it is to run on the CPU.

    Args:
        gpus: how many there are.
        label: the archive's name.
        is_lenient: ``deviceIds`` that are not there are left out with a warning, as TorchServe does.

    Raises:
        InvalidModelError: ``deviceIds`` names one that is not there.
    """
    if config.device_type == "cpu":
        return []
    if gpus == 0:
        if config.device_type == "gpu" or config.device_ids:
            asked = "deviceType is gpu" if config.device_type == "gpu" else f"deviceIds is {config.device_ids}"
            reason = "number_of_gpu is 0" if devices.count() else "torch sees none"
            log.warning("%s: %s but %s; serving on the CPU", label, asked, reason)
        return []
    allowed = list(dict.fromkeys(config.device_ids or range(gpus)))
    absent = [index for index in allowed if index >= gpus]
    if absent:
        there = "only GPU 0 is" if gpus == 1 else f"GPUs 0 to {gpus - 1} are"
        text = f"deviceIds {allowed} in model-config.yaml name GPU {absent[0]}, but {there} there"
        if devices.count() > gpus:
            text += f", as number_of_gpu={gpus} in config.properties has it"
        if not is_lenient:
            raise InvalidModelError(f"{label}: {text}; name GPUs that are, or take deviceIds out to use any")
        log.warning("%s: %s; using any", label, text)
        allowed = list(range(gpus))
    return allowed


def ordered_devices(
    allowed: Sequence[int], residents: Iterable[Resident] = (), *, workers: int = 1,
    free: Callable[[int], int | None] = free_bytes,
) -> list[str]:  # fmt: skip
    """Where a model's workers are to run: worker i on the i-th of these, in turn. ``["cpu"]`` if none is ``allowed``.

    Those with the most free memory come first, or where that is not known those with the fewest models; but those that
    the first workers get stay in the order of ``allowed``.

    Args:
        residents: the other models.
        workers: how many the model is to have at first.
    """
    there = list(residents)

    def rank(index: int) -> tuple[int, int]:
        neighbours = [each for each in there if devices.name_of(index) in each.devices]
        room = free(index) if len(allowed) > 1 else None
        return (0 if room is None else sum(each.coming_size for each in neighbours) - room, len(neighbours))

    ranked = sorted(allowed, key=rank)
    first = set(ranked[: max(1, workers)])
    order = [index for index in allowed if index in first] + ranked[len(first) :]
    return [devices.name_of(index) for index in order] or [devices.CPU]


def first_device(config: ModelConfig, gpus: int, label: str) -> str:
    """Where a model's first worker runs if there is no other model.

    Raises:
        InvalidModelError: as `allowed_devices`.
    """
    return ordered_devices(allowed_devices(config, gpus, label=label))[0]
