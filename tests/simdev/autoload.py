"""What torch imports by itself (entry point ``torch.backends``), where SIMDEV=1 asks for the simulated accelerator."""

from __future__ import annotations

import importlib
import os
import types


def load() -> None:
    if os.environ.get("SIMDEV") == "1":
        register()


def register() -> types.ModuleType:
    """Imports the device, and gives torch the Python functions that it asks of a backend."""
    import torch

    simdev = importlib.import_module("simdev")
    if hasattr(torch, "simdev"):
        return simdev
    module = types.ModuleType("torch.simdev")
    module.__dict__.update(
        is_available=lambda: simdev.device_count() > 0,
        is_initialized=simdev.is_used,
        _is_in_bad_fork=simdev.is_in_bad_fork,
        _lazy_init=lambda: None,
        current_device=simdev.current_device,
        device_count=simdev.device_count,
        manual_seed_all=lambda seed: None,
        get_device_name=lambda device=None: "simulated accelerator",
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
    )
    torch._register_device_module("simdev", module)
    return simdev
