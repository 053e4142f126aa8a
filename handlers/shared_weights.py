"""One copy of a TorchScript model's weights in memory for all worker processes that serve it.

`torch.jit.load` reads weights into memory of the process's own. `share_weights` writes them once to a file of a cache
folder and puts maps of that file in their place: the kernel keeps one copy of the file in memory, whoever maps it. The
maps are private and writable, so that a model may change its buffers; only what it changes becomes its own.

A file found in the cache is compared with the weights just read, byte by byte, before it is used.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyserve.handlers.mapped_load import original_of

log = logging.getLogger(__name__)

# The folder for such files, set by the server for its worker processes; weights are not shared without it.
CACHE_VARIABLE = "PYSERVE_WEIGHTS_CACHE"

# Smaller models are not worth a file.
SHARED_SIZE_MIN = 8 << 20

# Each storage begins at a multiple of this: aligned for every dtype and vector instruction.
_ALIGNMENT = 64


def share_weights(model: torch.nn.Module, source: Path) -> bool:
    """Puts maps of a file in the cache in place of ``model``'s weights, which were read from ``source``.

    Call it before the model runs for the first time.

    Returns:
        Whether they are shared now. They are not, and the model stays as it is, without a cache folder, if they are
        small or on an accelerator, or if the folder cannot be written.
    """
    folder = os.environ.get(CACHE_VARIABLE)
    if not folder:
        return False
    storages = _storages(model)
    size = sum(_padded(storage.nbytes()) for storage, _ in storages)
    if size < SHARED_SIZE_MIN:
        return False
    try:
        path = Path(folder) / f"{_identity(source)}.weights"
        with _locked(path):
            views = _matching_views(path, storages, size)
            if views is None:
                _write(path, storages)
                views = _matching_views(path, storages, size)
    except OSError as error:
        log.warning("weights are not shared between worker processes: %s: %s", folder, error.strerror)
        return False
    if views is None:
        log.warning("weights are not shared between worker processes: %s gives back other bytes than written", folder)
        return False
    for (_, tensors), view in zip(storages, views, strict=True):
        for tensor in tensors:
            flat = view[: len(view) // tensor.element_size() * tensor.element_size()].view(tensor.dtype)
            tensor.data = flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    storages.clear()
    _give_back_memory()
    return True


def _storages(model: torch.nn.Module) -> list[tuple[torch.UntypedStorage, list[torch.Tensor]]]:
    """The storages on the CPU behind the model's weights with the tensors in them, in an order that is the same in
    every process."""  # fmt: skip
    by_address: dict[int, tuple[torch.UntypedStorage, list[torch.Tensor]]] = {}
    for tensor in _weights(model):
        if tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.is_quantized:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                by_address.setdefault(storage.data_ptr(), (storage, []))[1].append(tensor)
    return list(by_address.values())


def _weights(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    graph = getattr(model, "graph", None) if isinstance(model, torch.jit.ScriptModule) else None
    if graph is not None:
        # A frozen model keeps its weights as constants of its graph.
        for node in graph.findAllNodes("prim::Constant"):
            if node.hasAttribute("value") and node.kindOf("value") == "t":
                yield node.t("value")


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _identity(source: Path) -> str:
    # Each model has a copy of its archive's files; those of one archive are the same weights.
    status = (original_of(source) or source).stat()
    parts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process at a time look for ``path`` and write it; the kernel lets go of the lock of one that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, storages: list[tuple[torch.UntypedStorage, Any]]) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with open(descriptor, "wb") as file:
            for storage, _ in storages:
                file.write(_bytes_of(storage).numpy().data)
                file.write(bytes(_padded(storage.nbytes()) - storage.nbytes()))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _matching_views(path: Path, storages: list[tuple[torch.UntypedStorage, Any]], size: int) -> list[Any] | None:
    """A mapped tensor of bytes per storage; None unless the file is there and holds exactly these."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if os.fstat(descriptor).st_size != size:
            return None
        mapped = memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY))
    finally:
        os.close(descriptor)
    views = []
    offset = 0
    for storage, _ in storages:
        view = torch.frombuffer(mapped[offset : offset + storage.nbytes()], dtype=torch.uint8)
        if not torch.equal(view, _bytes_of(storage)):
            return None
        views.append(view)
        offset += _padded(storage.nbytes())
    return views


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _give_back_memory() -> None:
    """What the weights took before is free, but glibc may keep it for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
