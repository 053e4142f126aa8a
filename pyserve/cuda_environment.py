"""Environment variables that CUDA reads when a process makes its first context; no torch here.

They are for the server process, whose native workers share one context. Worker processes and commands have what the
user has.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

# Name -> value, where the user has set none.
OWN_VALUES = {
    # Queues between the host and a GPU. Streams that share one wait for each other without need: with CUDA's 8 those
    # of a third worker already do, since each has three.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
}
# The names that were set here, so that processes which the server starts do not inherit them.
SET_HERE = "PYSERVE_OWN_VARIABLES"

# Freeing page-locked memory on a GPU that is lost raises within destructors, which ends the process before anybody is
# answered; with this torch keeps that memory instead.
CATCH_ALL = "pinned_free_catch_all"
# Of torch's allocators; what the user says there stays as it is.
ALLOCATOR_NAMES = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}


def knows_catch_all(torch_folder: Path | None = None) -> bool:
    """Whether torch has that setting; one that it does not know would be an error.

    Args:
        torch_folder: where torch is installed, if that is known.
    """
    if torch_folder is None:
        spec = find_spec("torch")  # which imports nothing
        if spec is None or not spec.submodule_search_locations:
            return False
        torch_folder = Path(spec.submodule_search_locations[0])
    try:
        header = (torch_folder / "include/c10/cuda/CUDAAllocatorConfig.h").read_text("utf-8", "replace")
    except OSError:
        return False
    return CATCH_ALL in header


def has_nvidia_driver(root: Path = Path("/")) -> bool:
    """Whether the kernel has NVIDIA's driver, and this process can see it.

    Args:
        root: where ``proc`` and ``dev`` are.
    """
    return any((root / path).exists() for path in ("proc/driver/nvidia/version", "dev/nvidiactl"))


def server_variables(environ: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """What is to be added to ``environ`` for the server process."""
    if not has_nvidia_driver(root):
        return {}
    added = {name: value for name, value in OWN_VALUES.items() if name not in environ}
    if not ALLOCATOR_NAMES & environ.keys() and knows_catch_all():
        added["PYTORCH_CUDA_ALLOC_CONF"] = f"{CATCH_ALL}:true"
    return {**added, SET_HERE: " ".join(added)} if added else {}


def without_own(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` as the user has it."""
    own = {SET_HERE, *environ.get(SET_HERE, "").split()}
    return {name: value for name, value in environ.items() if name not in own}
