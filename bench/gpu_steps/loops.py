"""One network in a direct loop, in the ways a program without a server could run it: what the engine is compared with.

    sync      TorchScript; up from pageable memory and back, waiting for each batch: what a plain handler does
    overlap   TorchScript; pinned memory, three streams, two batches in flight
    graph     a captured graph instead of the calls; the rest as ``overlap``

Inputs lie in pinned memory beforehand, in a buffer per slot: the direct loop gathers nothing, which favours it. Each
slot has inputs of its own, and its outputs are in host memory and compared when it is asked for them.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu_steps import device as on_device
from bench.gpu_steps.networks import DTYPES, Network
from bench.gpu_steps.truth import Truth

WAYS = ("sync", "overlap", "graph")
SLOT_COUNT = 2
WARM_UP_BATCHES = 6


@dataclass(frozen=True, slots=True)
class Form:
    """A network on a device in a precision: frozen TorchScript, pictures channels last."""

    network: Network
    precision: str
    device: torch.device
    script: Any

    def forward(self, inputs: Tensor) -> Tensor:
        """The answers on the device for inputs there."""
        return self.script(prepared(self.network, inputs, self.precision))


def form_of(network: Network, precision: str, device: torch.device) -> Form:
    module: Any = copy.deepcopy(network.module).to(device=device, dtype=DTYPES[precision])
    if network.is_picture:
        module = module.to(memory_format=torch.channels_last)
    with torch.no_grad():
        script = torch.jit.trace(module, prepared(network, network.items(2).to(device), precision), check_trace=False)
        return Form(network, precision, device, torch.jit.freeze(script.eval()))


def prepared(network: Network, inputs: Tensor, precision: str) -> Tensor:
    """Inputs on the device as the network takes them: numbers in its precision, pictures channels last."""
    if not network.dtype.is_floating_point:
        return inputs
    return inputs.to(DTYPES[precision], memory_format=torch.channels_last)


class DirectLoop:
    """A loop over batches of ``batch`` items. `step` launches one; all calls from one thread.

    Args:
        truth: has at least ``SLOT_COUNT * batch`` items.
    """

    def __init__(self, form: Form, truth: Truth, way: str, batch: int):
        self._truth, self._batch, self._device, self._way = truth, batch, form.device, way
        self._forward = form.forward
        chunks = [truth.items[i * batch : (i + 1) * batch].clone() for i in range(SLOT_COUNT)]
        self._hosts = [chunk if way == "sync" else chunk.pin_memory() for chunk in chunks]
        self._outs: list[Tensor] = []
        self._fixed: list[Tensor] = []
        self._graphs: list[Any] = []
        self._results: list[Tensor] = []
        with torch.inference_mode():
            if way != "sync":
                self._prepare()
            else:
                self._outs = [self._run_and_wait(slot) for slot in range(SLOT_COUNT)]

    def _run_and_wait(self, slot: int) -> Tensor:
        return self._forward(self._hosts[slot].to(self._device)).cpu()

    def _prepare(self) -> None:
        """Fixed buffers, streams, events, and a graph per slot whose memory both share."""
        device = self._device
        self._up, self._compute, self._back = (on_device.new_stream(device) for _ in range(3))
        self._copied, self._computed, self._ready = (
            [on_device.new_event(device) for _ in range(SLOT_COUNT)] for _ in range(3)
        )
        self._fixed = [host.to(device) for host in self._hosts]
        on_device.synchronize(device)
        with on_device.on(self._compute):
            for _ in range(WARM_UP_BATCHES):  # TorchScript compiles and cuDNN chooses in the first runs of a shape
                out = self._forward(self._fixed[0])
        on_device.synchronize(device)
        self._outs = [torch.empty(out.shape, dtype=out.dtype).pin_memory() for _ in range(SLOT_COUNT)]
        if self._way != "graph":
            return
        pool: Any = None
        for fixed in self._fixed:
            graph, result = on_device.capture(device, self._compute, functools.partial(self._forward, fixed), pool)
            # Replays follow one another on one stream, and both results are kept: sharing is safe.
            pool = graph.pool() if pool is None else pool
            self._graphs.append(graph)
            self._results.append(result)
        on_device.synchronize(device)

    def _wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def step(self, number: int) -> None:
        """Launches batch ``number``; waits until the one before in the same slot is in host memory."""
        slot = number % SLOT_COUNT
        if self._way == "sync":
            self._outs[slot] = self._run_and_wait(slot)
            return
        self._ready[slot].synchronize()
        with on_device.on(self._up):
            self._wait(self._up, self._computed[slot])  # the batch before has read the buffer
            self._fixed[slot].copy_(self._hosts[slot], non_blocking=True)
            self._copied[slot].record(self._up)
        with on_device.on(self._compute):
            self._wait(self._compute, self._copied[slot])
            self._wait(self._compute, self._ready[slot])  # a graph's result is read until then
            if self._graphs:
                self._graphs[slot].replay()
                result = self._results[slot]
            else:
                result = self._forward(self._fixed[slot])
            self._computed[slot].record(self._compute)
        with on_device.on(self._back):
            self._wait(self._back, self._computed[slot])
            self._outs[slot].copy_(result, non_blocking=True)
            if not self._graphs:
                result.record_stream(self._back)
            self._ready[slot].record(self._back)

    def finish(self) -> None:
        """Waits until all that was launched is in host memory."""
        on_device.synchronize(self._device)

    def error(self) -> float:
        """Runs each slot once more and compares: the largest difference; raises if that is too much.

        Every buffer on the way is cleared first: each slot has the same inputs all the time, and what was not waited
        for would be right by chance.
        """
        with torch.inference_mode():
            self.finish()
            for buffer in [*self._outs, *self._fixed, *self._results]:
                buffer.zero_()
            self.finish()
            for number in range(SLOT_COUNT):
                self.step(number)
            self.finish()
        return max(
            self._truth.check(out, list(range(slot * self._batch, (slot + 1) * self._batch)))
            for slot, out in enumerate(self._outs)
        )

    def rates(self, seconds: float, windows: int) -> list[float]:
        """Batches/s of each window. The pipe is full when a window opens, and what it ends with is waited for."""
        with torch.inference_mode():
            return [self._rate(seconds) for _ in range(windows)]

    def _rate(self, seconds: float) -> float:
        for number in range(WARM_UP_BATCHES):
            self.step(number)
        # With the pipe full on both sides as many batches end in the window as begin in it.
        count, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds or count == 0:
            self.step(count)
            count += 1
        passed = time.perf_counter() - began
        self.finish()
        return count / passed

    def alone_s(self, seconds: float) -> float:
        """Median of the time of one batch that nothing else runs beside, from its launch to its answer."""
        times: list[float] = []
        with torch.inference_mode():
            began = time.perf_counter()
            while time.perf_counter() - began < seconds or not times:
                start = time.perf_counter()
                self.step(0)
                if self._way != "sync":
                    self._ready[0].synchronize()
                times.append(time.perf_counter() - start)
        return statistics.median(times)


def middle(values: list[float], to_row: Callable[[float], float] = lambda value: value) -> dict[str, float]:
    """Median, lowest and highest of several windows."""
    return {
        "median": to_row(statistics.median(values)), "low": to_row(min(values)), "high": to_row(max(values)),
    }  # fmt: skip
