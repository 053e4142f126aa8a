"""The accelerator of this process, whatever its kind: streams, events, graphs, memory. CUDA's own where torch has none
for all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.gpu_steps.settings import Lacks


def accelerator() -> torch.device:
    """The first device of the accelerator; raises `Lacks` without one."""
    if not torch.accelerator.is_available():
        raise Lacks("an accelerator: torch finds none on this machine")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, 0)


def new_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device) if device.type == "cuda" else torch.Stream(device=device)


def new_event(device: torch.device) -> Any:
    return torch.cuda.Event() if device.type == "cuda" else torch.Event(device=device)


def on(stream: Any) -> Any:
    """A context in which the stream is the current one."""
    return torch.cuda.stream(stream) if stream.device.type == "cuda" else stream


def synchronize(device: torch.device) -> None:
    torch.accelerator.synchronize(device)


def capture(device: torch.device, stream: Any, body: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
    """(graph, what ``body`` returned), captured on ``stream``; ``pool`` is another graph's, to share its memory."""
    if device.type == "cuda":
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, pool=pool, capture_error_mode="thread_local"):
            return graph, body()
    make = getattr(torch.accelerator, "Graph", None)
    if make is None:
        raise Lacks(f"graphs: torch {torch.__version__} has none for {device.type}")
    graph = make(pool=pool, capture_error_mode="thread_local")
    with on(stream), graph:
        return graph, body()


def _memory_functions(device: torch.device) -> Any:
    return torch.cuda if device.type == "cuda" else torch.accelerator


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of torch's allocator: now allocated and reserved, and the most since `forget_peak`; empty if unknown."""
    try:
        stats = _memory_functions(device).memory_stats(device)
    except (AttributeError, RuntimeError, NotImplementedError):
        return {}
    names = {
        "allocated": "allocated_bytes.all.current", "reserved": "reserved_bytes.all.current",
        "allocated_peak": "allocated_bytes.all.peak", "reserved_peak": "reserved_bytes.all.peak",
    }  # fmt: skip
    return {name: int(stats[key]) for name, key in names.items() if key in stats}


def forget_peak(device: torch.device) -> None:
    """Gives unused memory back, and counts the peak anew."""
    synchronize(device)
    functions = _memory_functions(device)
    with contextlib.suppress(AttributeError, RuntimeError, NotImplementedError):
        functions.empty_cache()
    with contextlib.suppress(AttributeError, RuntimeError, NotImplementedError):
        functions.reset_peak_memory_stats(device)


def whole_memory(device: torch.device) -> tuple[int, int] | None:
    """(free, all) bytes of the device, other processes counted; ``None`` if unknown."""
    ask = torch.cuda.mem_get_info if device.type == "cuda" else getattr(torch.accelerator, "get_memory_info", None)
    if ask is None:
        return None
    with contextlib.suppress(RuntimeError, NotImplementedError):
        free, total = ask(device)
        return int(free), int(total)
    return None


@contextlib.contextmanager
def numbers_of(precision: str) -> Iterator[None]:
    """torch's switches for a precision: ``tf32`` has TensorFloat-32 in both places, ``exact`` in none, all others
    as torch has them by itself."""
    backends: Any = torch.backends
    places = [backends.cuda.matmul, backends.cudnn.conv]
    before = [place.fp32_precision for place in places]
    if precision in ("tf32", "exact"):
        for place in places:
            place.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
