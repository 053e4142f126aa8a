"""What ``pyserve doctor`` says of accelerators: which there are, and what keeps them from being used, or used well."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyserve.commands.doctor_check import NOTE, PASS, WARN, Check
from pyserve.cuda_environment import has_nvidia_driver
from pyserve.lanes import numa
from pyserve.telemetry import nvml

# Set by hand for debugging, and forgotten.
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": "each call waits for the GPU",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "all memory of the GPU is allocated anew for each batch",
    "HIP_LAUNCH_BLOCKING": "each call waits for the GPU",
}
_SHOWN = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_MODULE_LOADING",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK",
)  # fmt: skip
_MIB = 1 << 20


def device_checks(root: Path = Path("/")) -> Iterator[Check]:
    """All of it. Makes contexts, which this process can afford.

    REQUIRES: torch can be imported.

    Args:
        root: where ``proc``, ``dev`` and ``sys`` are.
    """
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if found is not None else 0
    if found is None or not count:
        yield _none(torch, root)
        return
    yield Check(PASS, "devices", ", ".join(_label(torch, found.type, index) for index in range(count)))
    for name in filter(os.environ.get, _SLOW):
        yield Check(WARN, "devices", f"{name} is set: {_SLOW[name]}", f"unset {name}, unless you are debugging")
    shown = [f"{name}={os.environ[name]}" for name in _SHOWN if name in os.environ]
    if shown:
        yield Check(PASS, "devices", "\n".join(shown))
    if found.type == "cuda" and not torch.version.hip:
        yield from _nvidia(root)
    yield from _graphs(found.type)
    yield _page_locked()
    yield from _nodes(found.type, count, root)


def _label(torch: Any, kind: str, index: int) -> str:
    name = f"{kind}:{index}"
    try:
        return f"{name} {torch.get_device_module(kind).get_device_name(index)}"
    except (RuntimeError, AttributeError):  # not every backend has names
        return name


def _none(torch: Any, root: Path) -> Check:
    """Why torch has no accelerator."""
    if not has_nvidia_driver(root):
        if (root / "dev/kfd").exists() and not torch.version.hip:
            return Check(WARN, "devices", "there is an AMD GPU, but this torch is not built for ROCm",
                         "install the torch that is, see pytorch.org")  # fmt: skip
        return Check(PASS, "devices", "CPU")
    there = "there is a GPU, but torch"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    fix = "install the torch that fits the driver which `nvidia-smi` names"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return Check(NOTE, "devices", f"CPU: CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides all GPUs",
                     "unset it to use them")  # fmt: skip
    if not torch.version.cuda:
        return Check(WARN, "devices", f"{there}, built for {built}, cannot use it", fix)
    try:
        driver = nvml.driver_state()
    except (nvml.NoLibraryError, LookupError, TimeoutError) as error:
        driver, why = None, str(error)
    if driver is not None and _major(driver.cuda) < _major(torch.version.cuda):
        text = f"{there}, built for {built}, cannot use it: driver {driver.version} runs CUDA {driver.cuda} at most"
        return Check(WARN, "devices", text, f"update the driver, or install a torch for CUDA {_major(driver.cuda)}")
    if not list((root / "dev").glob("nvidia[0-9]*")):
        return Check(WARN, "devices", "there is NVIDIA's driver, but this process sees none of its GPUs",
                     "start the container with them, such as `docker run --gpus all`")  # fmt: skip
    told = f": {why}" if driver is None else ""
    return Check(WARN, "devices", f"{there}, built for {built}, cannot use it{told}", fix)


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _nvidia(root: Path) -> Iterator[Check]:
    try:
        driver = nvml.driver_state()
    except (nvml.NoLibraryError, LookupError, TimeoutError) as error:
        text = f"{error}; usage is shown by running nvidia-smi again and again"
        yield Check(NOTE, "driver", text, "pip install nvidia-ml-py")
        driver = None
    if driver is not None:
        yield Check(PASS, "driver", f"{driver.version}, runs CUDA {driver.cuda}")
        if driver.sleeps:
            text = f"persistence mode is off: {', '.join(driver.sleeps)} need seconds to wake when nothing used them"
            yield Check(NOTE, "driver", text, "sudo nvidia-smi -pm 1, or run nvidia-persistenced")
        divided = [gpu.model for gpu in driver.gpus if gpu.parts is not None]
        if divided:
            parts = ", ".join(part for gpu in driver.gpus for part in gpu.parts or ())
            yield Check(PASS, "driver", f"divided (MIG): {', '.join(divided)}; parts: {parts or 'none'}")
        try:
            nvml.bus_addresses()
        except LookupError as error:
            yield Check(WARN, "driver", f"the usage of GPUs cannot be shown: {error}")
    folder = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or root / "tmp/nvidia-mps")
    if (folder / "control").exists():
        yield Check(PASS, "MPS", f"its daemon is running, in {folder}")
    else:
        text = "is not running: worker processes that share a GPU take turns, and each takes about 500 MB of its memory"
        yield Check(NOTE, "MPS", text, "nvidia-cuda-mps-control -d, before the server, where several of them share one")


def _graphs(kind: str) -> Iterator[Check]:
    """Whether this build and this torch can capture graphs."""
    from pyserve.engine import load_core

    try:
        has_graphs = getattr(load_core(), "has_graphs", None)
    except Exception:  # another line says that it cannot be loaded
        return
    if has_graphs is None:
        return
    if has_graphs(kind):
        yield Check(PASS, "graphs", "can be captured and replayed")
    else:
        fix = "build with the headers of CUDA and a torch for CUDA" if kind == "cuda" else ""
        yield Check(NOTE, "graphs", f"none: neither this build nor this torch has them for {kind}", fix)


def _page_locked() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft in (-1, resource.RLIM_INFINITY) else f"{soft / _MIB:.0f} MiB"
    text = f"`ulimit -l` is {limit}; CUDA's is limited by the memory of the machine or the cgroup alone"
    return Check(PASS, "locked memory", text)


def _nodes(kind: str, count: int, root: Path) -> Iterator[Check]:
    """Whether workers can run near their devices, where there are several NUMA nodes."""
    if len(list((root / "sys/devices/system/node").glob("node[0-9]*"))) < 2:
        return
    allowed = os.sched_getaffinity(0)
    for index in range(count):
        name = f"{kind}:{index}"
        address = numa.bus_address(index, kind)
        node = numa.node_of(address, root) if address is not None else None
        if node is None:
            yield Check(NOTE, "NUMA", f"{name}: its node is not known; its workers run anywhere")
        elif not numa.cpus_of(node, root) & allowed:
            yield Check(WARN, "NUMA", f"{name} is on node {node}, of which this process may use no CPU: copies to it "
                        "are slower", "allow some of them, or choose another device")  # fmt: skip
        else:
            near = len(numa.cpus_of(node, root) & allowed)
            yield Check(PASS, "NUMA", f"{name} is on node {node}: its workers keep to {near} of {len(allowed)} CPUs")
