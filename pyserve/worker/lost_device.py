"""Whether a failure of the handler has left this process without its device.

A kernel that read where it must not breaks the process's way to the device for good: each later call would fail, too.
So the process ends, and the zygote forks another; the device itself is well as a rule.
"""

from __future__ import annotations

import sys

from pyserve.engine import load_core
from pyserve.torch_error import cause_of

# How long a device may take to write one number, before it is taken for busy.
PROBE_S = 0.8


class DeviceLostError(BaseException):
    """The device is lost while there are requests that another worker may run. Passes ``except Exception``."""


def lost_device() -> str:
    """What is wrong with the device that this process uses; ``""`` if nothing is, or it uses none."""
    torch = sys.modules.get("torch")
    accelerator = torch.accelerator.current_accelerator() if torch is not None else None
    if torch is None or accelerator is None:
        return ""
    module = getattr(torch, accelerator.type, None)
    if module is None or not getattr(module, "is_initialized", lambda: False)():
        return ""
    try:
        device = f"{accelerator.type}:{torch.accelerator.current_device_index()}"
    except RuntimeError as error:  # it cannot even say that
        return cause_of(str(error)) or "it does not answer"
    state, text = load_core().probe_device(device, PROBE_S)
    return f"{device}: {cause_of(text) or 'no text'}" if state == "lost" else ""
