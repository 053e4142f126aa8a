"""The accelerators that torch can use, of whatever kind: CUDA, ROCm (which torch calls ``cuda``), XPU, another backend.

A process has accelerators of one kind. A device is named as torch names it, ``cuda:0``; ``cpu`` is none. Counting them
makes no context on any, so that a process may be forked afterwards.

Apple's ``mps`` is left out: it has neither pinned host memory nor streams of its own.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

CPU = "cpu"


def kind() -> str:
    """``cuda``, ``xpu`` or another kind's name in torch; ``""`` if torch was built for none that can be used."""
    import torch

    found = torch.accelerator.current_accelerator()
    return "" if found is None or found.type == "mps" else found.type


def count() -> int:
    """How many torch can use."""
    import torch

    if not kind():
        return 0
    return int(torch.accelerator.device_count())


def name_of(index: int | None) -> str:
    """``cuda:1`` for 1, ``cpu`` for None."""
    return CPU if index is None else f"{kind() or 'cuda'}:{index}"


def index_of(name: str) -> int | None:
    """The number in ``cuda:1``; None for ``cpu``."""
    return None if name == CPU else int(name.partition(":")[2] or 0)


def label(index: int) -> str:
    """What the maker calls it, ``NVIDIA H200``; ``""`` if torch does not know."""
    named = getattr(_module(), "get_device_name", None)
    try:
        return "" if named is None else str(named(index))
    except (RuntimeError, AssertionError, NotImplementedError):
        return ""


def is_used() -> bool:
    """Whether this process has used one; False without asking torch where that was not even imported."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not kind():
        return False
    # Python's modules of a kind do not notice what the native engine did.
    asked = getattr(torch._C, "_accelerator_isAllocatorInitialized", None)
    with contextlib.suppress(RuntimeError):  # torch was built for one, but there is none
        if asked is not None and asked():
            return True
    is_initialized = getattr(_module(), "is_initialized", None)
    return bool(is_initialized is not None and is_initialized())


def memory(index: int) -> tuple[int, int] | None:
    """Free and all bytes of one; None where torch does not say. Makes a context on it if this process has none."""
    import torch

    with contextlib.suppress(RuntimeError, AssertionError, NotImplementedError):
        asked = getattr(torch.accelerator, "get_memory_info", None) or getattr(_module(), "mem_get_info", None)
        if asked is not None:
            free, total = asked(index)
            return int(free), int(total)
    return None


def give_back() -> None:
    """Gives memory that nobody holds any more, of devices and pinned on the host, back to the system.

    Waits for what runs on the devices. Never raises: a device that has failed tells the next call.
    """
    if not is_used():
        return
    torch: Any = sys.modules["torch"]
    for owner in (torch.accelerator, _module()):
        empty = getattr(owner, "empty_cache", None)
        if empty is not None:
            with contextlib.suppress(RuntimeError):
                empty()
            break
    empty_host = getattr(torch.accelerator, "empty_host_cache", None)
    if empty_host is not None:
        with contextlib.suppress(RuntimeError):
            empty_host()


def random_states() -> list[Any]:
    """The states of the generators of random numbers, for `set_random_states`; empty if none has been used."""
    if not is_used():
        return []
    read = getattr(_module(), "get_rng_state_all", None)
    return [] if read is None else list(read())


def set_random_states(states: list[Any]) -> None:
    if states:
        _module().set_rng_state_all(states)


def _module() -> Any:
    """torch's own module for the kind: ``torch.cuda``."""
    import torch

    return torch.get_device_module(kind()) if kind() else None
