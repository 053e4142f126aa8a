"""What the machine has: the device, its link, torch's abilities, tools. Other steps say what they lack."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.gpu_steps.settings import Emit, Row, Settings

PACKAGES = (
    "torch", "torchvision", "numpy", "uvloop", "httptools", "orjson", "pillow", "python-multipart", "prometheus-client",
    "psutil", "rich", "pyyaml", "grpcio", "ninja", "hdrhistogram", "nvidia-ml-py", "pytest", "hypothesis",
)  # fmt: skip
TOOLS = ("g++", "nvcc", "nvidia-smi", "compute-sanitizer")
HEADERS = (
    "ATen/core/GraphImplInterface.h",
    "ATen/accelerator/Graph.h",
    "ATen/cuda/CUDAGraph.h",
    "c10/cuda/CUDAStream.h",
)
SMI_FIELDS = "name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current,clocks.sm,power.limit"


def run(settings: Settings, emit: Emit) -> None:
    """One row; ``device`` is its name, ``None`` if torch finds none."""
    emit({
        "device": device_name(), "python": sys.version.split()[0], "cores": os.cpu_count(),
        "cuda": torch.version.cuda, "gpu": smi(), "numa": numa_nodes(), "kernel": os.uname().release,
    })  # fmt: skip
    emit({"versions": {name: version(name) for name in PACKAGES}})
    emit(
        {"missing": [*[name for name in PACKAGES if not version(name)], *[n for n in TOOLS if shutil.which(n) is None]]}
    )
    emit(abilities())


def device_name() -> str | None:
    if not torch.accelerator.is_available():
        return None
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    with contextlib.suppress(Exception):
        return f"{kind.type}: {torch.get_device_module(kind).get_device_name(0)}"
    return kind.type


def abilities() -> Row:
    """What decides between ways to capture graphs, and which settings may be given."""
    include = Path(torch.__file__).parent / "include"
    row: Row = {
        "accelerator_graph": hasattr(torch.accelerator, "Graph"),
        "headers": [name for name in HEADERS if (include / name).exists()],
        "cuda_runtime_header": any(Path(p, "cuda_runtime_api.h").exists() for p in header_folders()),
        "crt_header": any(Path(p, "crt/host_defines.h").exists() for p in header_folders()),
    }
    if torch.version.cuda:
        row["raw_cuda_graph_exec"] = hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph_exec")
        settings = ("pinned_free_catch_all:True", "per_process_memory_fraction:0.5")
        with ThreadPoolExecutor() as pool:
            row["allocator_settings"] = dict(zip(settings, pool.map(accepts, settings), strict=True))
    return row


def header_folders() -> list[str]:
    """Where CUDA's headers may lie: a toolkit, or the wheels that torch brings."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    site = Path(torch.__file__).parents[1] / "nvidia"
    return [f"{home}/include", *map(str, site.glob("*/include"))]


def accepts(setting: str) -> bool:
    """Whether torch's allocator knows it: an unknown one is an error at its first use, hence a process of its own."""
    variables = {"PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting}
    command = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"]
    done = subprocess.run(command, capture_output=True, timeout=20, check=False, env={**os.environ, **variables})
    return done.returncode == 0 and b"nrecognized" not in done.stderr


def smi() -> dict[str, str] | None:
    """What nvidia-smi says of the first device; ``None`` without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return None
    values = (done.stdout.splitlines() or [""])[0].split(",")
    return {name: value.strip() for name, value in zip(SMI_FIELDS.split(","), values, strict=False)}


def numa_nodes() -> dict[str, str]:
    """The CPUs of each node."""
    nodes: dict[str, str] = {}
    for path in sorted(Path("/sys/devices/system/node").glob("node*/cpulist")):
        with contextlib.suppress(OSError):
            nodes[path.parent.name] = path.read_text().strip()
    return nodes


def version(name: str) -> Any:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None
