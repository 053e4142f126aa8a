"""The driver of NVIDIA's GPUs, asked by ``nvidia-ml-py`` (the extra ``gpu``): no CUDA context, no process.

A driver may hang, and takes the thread that asks it with it: no call from the loop thread.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from pyserve.telemetry.visible_gpus import DriverGpu, visible_gpus

ASKING_MAX_S = 3.0

# One thread at a time asks the driver; its library is initialised once and stays.
_asking = threading.Lock()
_is_initialised = False


class Usage(NamedTuple):
    """Of one device.

    Attributes:
        used_size, total_size: of its memory, in bytes, whoever uses it.
        busy, memory_busy: percent of the last moment in which kernels ran, and memory was read or written; None
            where the driver does not know, as for a part of a GPU.
    """

    used_size: int
    total_size: int
    busy: int | None = None
    memory_busy: int | None = None


class NoLibraryError(Exception):
    """There is no library, or no driver that it knows; the text says which."""


@contextlib.contextmanager
def _library() -> Iterator[Any]:
    """``pynvml``, for one thread at a time.

    Raises:
        NoLibraryError: see there.
        LookupError: the driver refuses.
        TimeoutError: the thread that asked before still waits for an answer.
    """
    global _is_initialised
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except Exception as error:  # another package of that name may do anything
        raise NoLibraryError(f"nvidia-ml-py cannot be imported: {error}") from None
    if not _asking.acquire(timeout=ASKING_MAX_S):
        raise TimeoutError("the driver does not answer")
    try:
        if not _is_initialised:
            try:
                pynvml.nvmlInit()
            except Exception as error:
                raise NoLibraryError(f"there is no driver: {error}") from None
            _is_initialised = True
        yield pynvml
    except (NoLibraryError, LookupError):
        raise
    except Exception as error:  # its errors have a class of their own
        raise LookupError(f"the driver does not answer as it should: {error}") from error
    finally:
        _asking.release()


def usages(indexes: Collection[int]) -> dict[int, Usage]:
    """Of those of ``indexes``, torch's, that the driver says something about.

    Raises:
        NoLibraryError, TimeoutError: as they say.
        LookupError: which GPU is which cannot be known; the text says what to set.
    """
    found = {}
    with _library() as pynvml:
        names = _visible(pynvml)
        for index in indexes:
            # A GPU that fell off the bus, an old library: the others are shown.
            with contextlib.suppress(Exception):
                found[index] = _usage(pynvml, pynvml.nvmlDeviceGetHandleByUUID(names[index]))
    return found


def free_memory(index: int) -> tuple[int, int] | None:
    """Free and total bytes of the memory that torch counts as ``index``; None where they are not known. Any thread: it
    waits for the driver for ASKING_MAX_S at most."""  # fmt: skip
    found: dict[int, Usage] = {}

    def ask() -> None:
        with contextlib.suppress(NoLibraryError, TimeoutError, LookupError):
            found.update(usages([index]))

    thread = threading.Thread(target=ask, name="gpu-usage", daemon=True)
    thread.start()
    thread.join(ASKING_MAX_S)
    usage = found.get(index)
    return None if usage is None else (usage.total_size - usage.used_size, usage.total_size)


def bus_addresses() -> list[str]:
    """Where on the bus the GPUs are that torch counts, in its order, as ``/sys/bus/pci/devices`` names them.

    Raises:
        NoLibraryError, TimeoutError, LookupError: as `usages`.
    """
    with _library() as pynvml:
        return [_bus_address(pynvml, pynvml.nvmlDeviceGetHandleByUUID(name)) for name in _visible(pynvml)]


class DriverState(NamedTuple):
    """What the driver says of itself.

    Attributes:
        version: of the driver.
        cuda: the newest CUDA that it can run, such as ``13.0``.
        gpus: all of them.
        sleeps: models of those that are switched off while nobody uses them (persistence mode is off).
    """

    version: str
    cuda: str
    gpus: list[DriverGpu]
    sleeps: list[str]


def driver_state() -> DriverState:
    """For people. Raises as `usages`."""
    with _library() as pynvml:
        number = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        gpus, sleeps = [], []
        for handle in _handles(pynvml):
            gpus.append(_gpu(pynvml, handle))
            with contextlib.suppress(Exception):
                if not pynvml.nvmlDeviceGetPersistenceMode(handle):
                    sleeps.append(gpus[-1].model)
        version = _text(pynvml.nvmlSystemGetDriverVersion())
        return DriverState(version, f"{number // 1000}.{number % 1000 // 10}", gpus, sleeps)


def _visible(pynvml: Any) -> list[str]:
    return visible_gpus([_gpu(pynvml, handle) for handle in _handles(pynvml)], os.environ)


def _handles(pynvml: Any) -> list[Any]:
    return [pynvml.nvmlDeviceGetHandleByIndex(place) for place in range(pynvml.nvmlDeviceGetCount())]


def _gpu(pynvml: Any, handle: Any) -> DriverGpu:
    return DriverGpu(
        _text(pynvml.nvmlDeviceGetUUID(handle)), _text(pynvml.nvmlDeviceGetName(handle)), _parts(pynvml, handle)
    )


def _parts(pynvml: Any, handle: Any) -> list[str] | None:
    try:
        is_divided = bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except Exception:  # most GPUs cannot be divided, which is an error here
        return None
    if not is_divided:
        return None
    parts = []
    for place in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(Exception):  # there are fewer of them
            parts.append(_text(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place))))
    return parts


def _usage(pynvml: Any, handle: Any) -> Usage:
    # The second version counts as `nvidia-smi` does: what the driver reserves for itself is not used.
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except Exception:  # an old driver, or an old library
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    busy = memory_busy = None
    with contextlib.suppress(Exception):  # of a part of a GPU it is not known
        rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
        busy, memory_busy = int(rates.gpu), int(rates.memory)
    return Usage(int(memory.used), int(memory.total), busy, memory_busy)


def _bus_address(pynvml: Any, handle: Any) -> str:
    with contextlib.suppress(Exception):  # it is no part of a GPU
        handle = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    return bus_address(_text(pynvml.nvmlDeviceGetPciInfo(handle).busId))


def bus_address(text: str) -> str:
    """``00000000:3B:00.0`` as the kernel writes it, ``0000:3b:00.0``."""
    domain, _, rest = text.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def _text(told: str | bytes) -> str:
    return told.decode() if isinstance(told, bytes) else told
