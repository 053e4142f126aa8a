"""What accelerators are doing, in TorchServe's words. Loop thread only.

    NVIDIA   the driver's library, if ``nvidia-ml-py`` is installed; else ``nvidia-smi`` is run, once for all GPUs
    others   the memory of those that this process uses, from torch

No CUDA context is made for it: that would take half a GB of a GPU's memory, also where all models run in worker
processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from pyserve.telemetry import nvml
from pyserve.telemetry.nvml import NoLibraryError, Usage
from pyserve.telemetry.visible_gpus import DriverGpu, visible_gpus

log = logging.getLogger(__name__)

NO_GPU = "N/A"
UNKNOWN = "failed to obtained gpu usage"  # TorchServe's words
NOT_TOLD = "[N/A]"  # the driver's
KEPT_S = 5.0  # running nvidia-smi takes a good part of a second
TIMEOUT_S = 3.0
_FIELDS = "uuid,name,memory.used,memory.total,utilization.gpu,utilization.memory"
_COMMAND = ("nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
_MIB = 1 << 20

Ask = Callable[[Collection[int]], Awaitable[dict[int, Usage]]]


async def ask_usage(indexes: Collection[int]) -> dict[int, Usage]:
    """Of those of ``indexes``, as torch counts them, of which something is known.

    Raises:
        OSError, ValueError, LookupError, TimeoutError: nothing is.
    """
    import torch

    device = torch.accelerator.current_accelerator()  # by what torch was built with: it initialises nothing
    # A driver that hangs holds a thread, not the loop, and `nvidia-smi` would hang as well.
    if device is not None and (device.type != "cuda" or torch.version.hip):
        return await asyncio.wait_for(_in_daemon_thread(usages_here, indexes), TIMEOUT_S)
    try:
        return await asyncio.wait_for(_in_daemon_thread(nvml.usages, indexes), TIMEOUT_S)
    except NoLibraryError as error:
        log.debug("%s; running nvidia-smi", error)
    return _told(await _run_command(), indexes)


def usages_here(indexes: Collection[int]) -> dict[int, Usage]:
    """Those whose memory this process uses. Asking for another one's would make a context on it."""
    import torch

    found = {}
    for index in indexes:
        with contextlib.suppress(RuntimeError, AttributeError, ValueError):  # not every backend counts, nor torch
            if torch.accelerator.memory_reserved(index):
                free, total = torch.accelerator.get_memory_info(index)
                found[index] = Usage(total - free, total)
    return found


def _in_daemon_thread(call: Callable[[Any], Any], argument: Any) -> asyncio.Future[Any]:
    """What ``call(argument)`` returns. Its thread is none of a pool, which the process would wait for when it exits."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def deliver(result: Any, error: BaseException | None) -> None:
        if future.done():
            return  # nobody waits any more
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = call(argument)
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=run, name="gpu-usage", daemon=True).start()
    return future


def _told(text: str, indexes: Collection[int]) -> dict[int, Usage]:
    """What `_COMMAND` printed, a GPU a line."""
    rows = [[word.strip() for word in line.split(",")] for line in text.splitlines() if line.strip()]
    by_name = {}
    for uuid, _, used, total, *rates in (row for row in rows if len(row) == len(_FIELDS.split(","))):
        if not (used.isdecimal() and total.isdecimal()):
            continue  # it shares the machine's memory
        busy, memory_busy = (int(rate) if rate.isdecimal() else None for rate in rates)
        by_name[uuid] = Usage(int(used) * _MIB, int(total) * _MIB, busy, memory_busy)
    names = visible_gpus([DriverGpu(*row[:2]) for row in rows if row[0].startswith("GPU-")], os.environ)
    numbered = dict(enumerate(names))
    return {index: by_name[numbered[index]] for index in indexes if numbered.get(index) in by_name}


async def _run_command() -> str:
    process = await asyncio.create_subprocess_exec(
        *_COMMAND, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise
    if process.returncode:
        raise ValueError(f"nvidia-smi exited with {process.returncode}")
    return output.decode("ascii", "replace")


class GpuUsage:
    """The last known usage of each device.

    Args:
        ask: see `ask_usage`.
        clock: seconds.
    """

    def __init__(self, ask: Ask = ask_usage, clock: Callable[[], float] = time.monotonic):
        self._ask = ask
        self._clock = clock
        self._texts: dict[int, tuple[float, str]] = {}

    async def refresh(self, indexes: set[int]) -> None:
        """Asks for those whose usage is not known or older than KEPT_S."""
        now = self._clock()
        stale = sorted(index for index in indexes if now - self._texts.get(index, (-KEPT_S, ""))[0] >= KEPT_S)
        if not stale:
            return
        usages: dict[int, Usage] = {}
        try:
            usages = await self._ask(stale)
        except (OSError, ValueError, LookupError, RuntimeError, TimeoutError) as error:
            log.debug("the usage of GPUs %s cannot be had: %s", stale, error)
        for index in stale:
            self._texts[index] = (now, _text(index, usages[index]) if index in usages else UNKNOWN)

    def text(self, index: int | None) -> str:
        """``gpuId::0 utilization.gpu::3 % ...``; None is no GPU."""
        if index is None:
            return NO_GPU
        return self._texts.get(index, (0.0, UNKNOWN))[1]


def _text(index: int, usage: Usage) -> str:
    busy, memory_busy = (NOT_TOLD if rate is None else f"{rate} %" for rate in (usage.busy, usage.memory_busy))
    used = f"memory.used::{usage.used_size // _MIB} MiB"
    return f"gpuId::{index} utilization.gpu::{busy} utilization.memory::{memory_busy} {used}"
