"""What the GPUs are doing, in TorchServe's words, as the driver reports it. Loop thread only.

The driver's library is asked, if ``nvidia-ml-py`` is installed; else ``nvidia-smi`` is run.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

log = logging.getLogger(__name__)

NO_GPU = "N/A"
UNKNOWN = "failed to obtained gpu usage"  # TorchServe's words
KEPT_S = 5.0  # running nvidia-smi takes a good part of a second
TIMEOUT_S = 3.0
_COMMAND = ("nvidia-smi", "--query-gpu=utilization.gpu,utilization.memory,memory.used", "--format=csv,noheader,nounits")

# One thread at a time asks the driver; its library is initialised once and stays.
_asking = threading.Lock()
_is_initialised = False


async def ask_driver(index: int) -> str:
    """Three numbers separated by commas, of the GPU that torch counts as ``index``.

    Raises:
        OSError, ValueError, RuntimeError, AssertionError, TimeoutError: they are not to be had.
    """
    import torch

    # The driver counts all GPUs, torch those that CUDA_VISIBLE_DEVICES leaves; both know the name.
    name = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    # A driver that hangs holds a thread, not the loop, and `nvidia-smi` would hang as well.
    text = await asyncio.wait_for(_in_daemon_thread(_ask_library, name), TIMEOUT_S)
    return text or await _ask_command(name)


def _in_daemon_thread(call: Callable[[str], str], name: str) -> asyncio.Future[str]:
    """What ``call(name)`` returns. Its thread is none of a pool, which the process would wait for when it exits."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[str] = loop.create_future()

    def deliver(text: str, error: BaseException | None) -> None:
        if future.done():
            return  # nobody waits any more
        if error is None:
            future.set_result(text)
        else:
            future.set_exception(error)

    def run() -> None:
        text, error = "", None
        try:
            text = call(name)
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(deliver, text, error)

    threading.Thread(target=run, name="gpu-usage", daemon=True).start()
    return future


def _ask_library(name: str) -> str:
    """What the driver's own library says, by ``nvidia-ml-py``; ``""`` without it, or if it does not say.

    Raises:
        TimeoutError: the thread that asked before still waits for an answer.
    """
    global _is_initialised
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except Exception:  # another package of that name may do anything
        return ""
    if not _asking.acquire(timeout=TIMEOUT_S):
        raise TimeoutError("the driver does not answer")
    try:
        if not _is_initialised:
            pynvml.nvmlInit()
            _is_initialised = True
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
        # The second version counts as `nvidia-smi` does: what the driver reserves for itself is not used.
        used = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used
        return f"{int(rates.gpu)}, {int(rates.memory)}, {int(used) >> 20}"
    except Exception as error:  # no driver, a GPU that is cut into parts, an old library: the command may know
        log.debug("nvidia-ml-py does not tell the usage of %s: %s", name, error)
        return ""
    finally:
        _asking.release()


async def _ask_command(name: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *_COMMAND, f"--id={name}", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
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
    """The last known usage of each GPU.

    Args:
        ask: see `ask_driver`.
        clock: seconds.
    """

    def __init__(self, ask: Callable[[int], Awaitable[str]] = ask_driver, clock: Callable[[], float] = time.monotonic):
        self._ask = ask
        self._clock = clock
        self._texts: dict[int, tuple[float, str]] = {}

    async def refresh(self, indexes: set[int]) -> None:
        """Asks for those whose usage is not known or older than KEPT_S."""
        now = self._clock()
        stale = sorted(index for index in indexes if now - self._texts.get(index, (-KEPT_S, ""))[0] >= KEPT_S)
        for index, text in zip(stale, await asyncio.gather(*map(self._text, stale)), strict=True):
            self._texts[index] = (now, text)

    def text(self, index: int | None) -> str:
        """``gpuId::0 utilization.gpu::3 % ...``; None is no GPU."""
        if index is None:
            return NO_GPU
        return self._texts.get(index, (0.0, UNKNOWN))[1]

    async def _text(self, index: int) -> str:
        try:
            gpu, memory, used = (int(each) for each in (await self._ask(index)).split(","))
        except (OSError, ValueError, RuntimeError, AssertionError, TimeoutError) as error:  # torch asserts that it can
            log.debug("the usage of GPU %d cannot be had: %s", index, error)
            return UNKNOWN
        return f"gpuId::{index} utilization.gpu::{gpu} % utilization.memory::{memory} % memory.used::{used} MiB"
