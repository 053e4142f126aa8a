"""Where a model runs and with how many workers, when nothing else was asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from pyserve.archive.model_config import ModelConfig

log = logging.getLogger(__name__)


def gpu_count(most: int | None) -> int:
    """GPUs that torch can use, at most ``most`` (None: all)."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count if most is None else min(count, most)


def choose_device(config: ModelConfig, gpus: int, taken: Iterable[str]) -> str:
    """``cpu``, or the GPU that holds the fewest models; ``deviceType`` and ``deviceIds`` are obeyed if possible.

    Args:
        gpus: how many there are.
        taken: devices of the models that are loaded.
    """
    if gpus == 0 or config.device_type == "cpu":
        if config.device_type == "gpu":
            log.warning("deviceType is gpu but torch sees none; serving on the CPU")
        return "cpu"
    allowed = config.device_ids or list(range(gpus))
    if any(index >= gpus for index in allowed):
        log.warning("deviceIds %s name a GPU that is not there (%d found); using any", allowed, gpus)
        allowed = list(range(gpus))
    load = list(taken)
    return min((f"cuda:{index}" for index in allowed), key=load.count)
