"""The accelerators of a process, whatever kind they are; torch's own functions are replaced."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyserve import devices


def pretend(monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int = 2, **module: Callable[..., Any]) -> None:
    """Makes torch say that it has ``count`` devices of ``kind``, whose own module has the functions ``module``."""
    found = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: types.SimpleNamespace(**module))
    monkeypatch.setattr(torch._C, "_accelerator_isAllocatorInitialized", lambda: False, raising=False)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_devices_have_the_names_that_torch_gives_them(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    pretend(monkeypatch, kind)
    assert (devices.kind(), devices.count()) == (kind, 2)
    assert devices.name_of(1) == f"{kind}:1"
    assert torch.device(devices.name_of(1)) == torch.device(kind, 1)
    assert devices.index_of(f"{kind}:1") == 1


def test_without_one_there_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None, 0)
    assert (devices.kind(), devices.count(), devices.is_used()) == ("", 0, False)
    assert devices.name_of(None) == "cpu"
    assert devices.index_of("cpu") is None
    assert devices.random_states() == []
    devices.give_back()


def test_mps_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "mps", 1)
    assert (devices.kind(), devices.count()) == ("", 0)


def test_use_by_the_engine_is_noticed_though_pythons_module_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda", is_initialized=lambda: False)
    assert not devices.is_used()
    monkeypatch.setattr(torch._C, "_accelerator_isAllocatorInitialized", lambda: True, raising=False)
    assert devices.is_used()


def test_older_torch_is_asked_through_the_kinds_own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    pretend(monkeypatch, "cuda", is_initialized=lambda: True, mem_get_info=lambda index: (index, 10),
            empty_cache=lambda: calls.append("emptied"), get_device_name=lambda index: f"GPU {index}")  # fmt: skip
    for name in ("get_memory_info", "empty_cache", "empty_host_cache"):
        monkeypatch.delattr(torch.accelerator, name, raising=False)
    assert devices.memory(1) == (1, 10)
    assert devices.label(1) == "GPU 1"
    devices.give_back()
    assert calls == ["emptied"]


def test_a_device_that_has_failed_is_no_error_of_who_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    pretend(monkeypatch, "cuda", is_initialized=lambda: True, get_device_name=fails)
    for name in ("get_memory_info", "empty_cache", "empty_host_cache"):
        monkeypatch.setattr(torch.accelerator, name, fails, raising=False)
    devices.give_back()
    assert devices.memory(0) is None
    assert devices.label(0) == ""
