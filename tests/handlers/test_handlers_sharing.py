"""TorchScript weights in worker processes: one copy for all of them, and never anybody else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.handlers import shared_weights
from pyserve.handlers.loading import load_torchscript
from pyserve.handlers.shared_weights import CACHE_VARIABLE, share_weights

WIDTH = 2000  # 16 MB in each of the two layers

# Loads the model, runs it, says so, and waits to be asked how much memory is its own and how much its share.
WORKER = """
import json, sys
from pathlib import Path
import torch
from pyserve.handlers.loading import load_torchscript

def memory():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}

torch.set_num_threads(1)
with torch.inference_mode():
    torch.nn.Linear(2000, 10)(torch.zeros(1, 2000))
before = memory()["Pss"]
model = load_torchscript(Path(sys.argv[1]), torch.device("cpu"))
with torch.inference_mode():
    answer = model(torch.ones(1, 2000)).sum().item()
print(json.dumps({"answer": answer}), flush=True)
for _ in sys.stdin:
    print(json.dumps({"Pss": memory()["Pss"], "before": before}), flush=True)
"""


class Layers(torch.nn.Module):
    """Tied weights, a buffer, and one tensor of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.second = torch.nn.Linear(WIDTH, WIDTH)
        self.tied = torch.nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.first.weight
        self.norm = torch.nn.BatchNorm1d(WIDTH)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.norm(self.tied(self.second(self.first(numbers))))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def packed(folder: Path, *, frozen: bool = False) -> tuple[Path, Layers]:
    model = Layers().eval()
    scripted: Any = torch.jit.script(model)
    (torch.jit.freeze(scripted) if frozen else scripted).save(str(folder / "model.pt"))
    return folder / "model.pt", model


@contextmanager
def worker(path: Path) -> Iterator[subprocess.Popen[str]]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WORKER, str(path)], **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdout is not None
    values: dict[str, float] = json.loads(process.stdout.readline())
    return values


def weights_memory(path: Path, count: int) -> tuple[float, list[float]]:
    """Bytes that ``count`` processes have more, all together, once they have loaded the model; and their answers."""
    with ExitStack() as stack:
        workers = [stack.enter_context(worker(path)) for _ in range(count)]
        answers = [told(each)["answer"] for each in workers]
        sizes = []
        for each in workers:
            assert each.stdin is not None
            each.stdin.write("?\n")
            each.stdin.flush()
            sizes.append(told(each))
        return sum(size["Pss"] - size["before"] for size in sizes), answers


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_processes_have_one_copy_of_the_weights(tmp_path: Path, cache: Path, frozen: bool) -> None:
    path, model = packed(tmp_path, frozen=frozen)
    expected = model(torch.ones(1, WIDTH)).sum().item()
    count = 3
    size, answers = weights_memory(path, count)
    assert answers == pytest.approx([expected] * count, rel=1e-4)
    (kept,) = cache.glob("*.weights")
    one_copy = kept.stat().st_size
    os.environ.pop(CACHE_VARIABLE)
    size_without, answers = weights_memory(path, count)
    assert answers == pytest.approx([expected] * count, rel=1e-4)
    # Without sharing every process has its copy; with it all but one are saved. What else they load is the same.
    assert size_without - size > 0.9 * (count - 1) * one_copy


def test_shared_model_answers_as_before_and_may_change_itself(tmp_path: Path, cache: Path) -> None:
    path, model = packed(tmp_path)
    shared, other = load_torchscript(path, torch.device("cpu")), load_torchscript(path, torch.device("cpu"))
    maps = Path("/proc/self/maps").read_text()
    (kept,) = cache.glob("*.weights")
    assert str(kept) in maps
    numbers = torch.randn(4, WIDTH)
    assert torch.allclose(shared(numbers), model(numbers), atol=1e-5)
    assert shared.first.weight.data_ptr() == shared.tied.weight.data_ptr()
    assert shared.first.weight.requires_grad
    content = kept.read_bytes()
    with torch.no_grad():
        shared.norm.running_mean.add_(1)
        shared.first.weight.zero_()
    assert kept.read_bytes() == content
    assert torch.allclose(other(numbers), model(numbers), atol=1e-5)


def test_cache_file_with_other_bytes_is_not_used(tmp_path: Path, cache: Path) -> None:
    path, model = packed(tmp_path)
    load_torchscript(path, torch.device("cpu"))
    (kept,) = cache.glob("*.weights")
    numbers = torch.randn(2, WIDTH)
    right = kept.read_bytes()
    for wrong in (bytes(len(right)), right[:-64], right + bytes(64), b""):
        kept.write_bytes(wrong)
        assert torch.allclose(load_torchscript(path, torch.device("cpu"))(numbers), model(numbers), atol=1e-5)
        assert kept.read_bytes() == right
    assert not list(cache.glob("*.part"))


def test_another_file_gets_another_cache_file(tmp_path: Path, cache: Path) -> None:
    path, _ = packed(tmp_path)
    load_torchscript(path, torch.device("cpu"))
    os.utime(path, ns=(1, 1))
    load_torchscript(path, torch.device("cpu"))
    assert len(list(cache.glob("*.weights"))) == 2


def test_small_models_and_no_cache_folder_mean_no_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.jit.script(torch.nn.Linear(4, 4)).save(str(tmp_path / "small.pt"))
    assert not share_weights(load_torchscript(tmp_path / "small.pt", None), tmp_path / "small.pt")
    assert not cache.exists()
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setattr(shared_weights, "SHARED_SIZE_MIN", 0)
    assert not share_weights(load_torchscript(tmp_path / "small.pt", None), tmp_path / "small.pt")


def test_cache_folder_that_cannot_be_written_is_said_and_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    path, model = packed(tmp_path)
    numbers = torch.randn(2, WIDTH)
    assert torch.allclose(load_torchscript(path, torch.device("cpu"))(numbers), model(numbers), atol=1e-5)
    assert "weights are not shared" in caplog.text
