"""Small models for the tests that serve: each one's network to ask directly, and its archive to serve."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pyserve.archive.packing import ArchiverConfig, write_archive

LABELS = {str(index): f"class {index}" for index in range(12)}
VOCABULARY = {"<unk>": 0, "bad": 1, "good": 2, "worse": 3}
LINEAR_INPUT = {"dtype": "float32", "shape": [4]}


class Linear(torch.nn.Module):
    """[n, 4] -> [n, 3]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(4, 3, generator=generator))
        self.bias = torch.nn.Parameter(torch.randn(3, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Wide(torch.nn.Module):
    """[n, 4] -> [n, 1], with 64 MB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4000, 4000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.sum(1, keepdim=True).expand(-1, 4000) @ self.weight)[:, :1]


class Burn(torch.nn.Module):
    """[n, 2] of (number, rounds) -> [n, 1] the numbers, after as many rounds of work as the largest asks for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounds = int(x[:, 1].max().item())
        unit = torch.eye(96)
        product = unit
        for _ in range(rounds):
            product = product @ unit
        return x[:, :1] * product[0, 0]


class Pictures(torch.nn.Module):
    """[n, 3, 224, 224] -> scores [n, 12], by one residual block."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.stem = torch.nn.Conv2d(3, 8, 7, stride=8)
            self.block = torch.nn.Conv2d(8, 8, 3, padding=1)
            self.norm = torch.nn.BatchNorm2d(8)
            self.head = torch.nn.Linear(8, 12)
            # So that the scores of different pictures differ by much.
            self.head.weight.data *= 20

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.norm(self.block(x)))
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores


class Words(torch.nn.Module):
    """Numbers of words [m] and where each text begins [n] -> scores [n, 2]: of even numbers, and of odd ones."""

    def __init__(self) -> None:
        super().__init__()
        weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(len(VOCABULARY) // 2, 1)
        self.bag = torch.nn.EmbeddingBag.from_pretrained(weights, mode="sum")

    def forward(self, numbers: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.bag(numbers, offsets)
        return scores


class Pair(torch.nn.Module):
    """Two inputs [n, k] -> [n, 1], the sum of the first where the second is 1."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (ids * mask).sum(1, keepdim=True)


def write_torchscript(
    store: Path,
    network: torch.nn.Module,
    name: str,
    *,
    version: str = "1.0",
    file: str | None = None,
    handler: str = "tensor",
    config: dict[str, Any] | None = None,
    labels: dict[str, str] | None = None,
    calibration: Path | None = None,
    vocabulary: dict[str, int] | None = None,
) -> Path:
    """``store/{file or name}.mar`` with the scripted network, and what lies in the folder ``calibration``."""

    def save(path: Path) -> None:
        torch.jit.script(network.eval()).save(str(path))

    return _write(
        store, save, ".pt", name, version=version, file=file, handler=handler, config=config, labels=labels,
        calibration=calibration, vocabulary=vocabulary,
    )  # fmt: skip


def write_package(store: Path, network: torch.nn.Module, example: torch.Tensor, name: str) -> Path:
    """``store/{name}.mar`` with the network compiled by AOTInductor for any batch size; takes a while."""
    with tempfile.TemporaryDirectory() as folder:
        package = compile_package(network, example, Path(folder) / "compiled.pt2")
        return write_compiled(store, package, tuple(example.shape[1:]), name)


def compile_package(network: torch.nn.Module, example: torch.Tensor, path: Path) -> Path:
    """``path``, with the network compiled by AOTInductor for any batch size; takes a while."""
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(network.eval(), (example,), dynamic_shapes=({0: batch},))
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
    return path


def write_compiled(store: Path, package: Path, shape: Sequence[int], name: str) -> Path:
    """``store/{name}.mar`` with what was compiled for items of ``shape``."""
    config = {"input": {"dtype": "float32", "shape": list(shape)}}
    return _write(store, lambda path: path.write_bytes(package.read_bytes()), ".pt2", name, config=config)


def write_eager(store: Path, name: str, source: str, state: dict[str, torch.Tensor], *, config: dict[str, Any]) -> Path:
    """``store/{name}.mar`` with a model file and a state dict, which need not go together."""
    return _write(
        store, lambda path: torch.save(state, path), ".pth", name, config=config, model_file=source
    )  # fmt: skip


def _write(
    store: Path,
    save: Callable[[Path], object],
    suffix: str,
    name: str,
    *,
    version: str = "1.0",
    file: str | None = None,
    handler: str = "tensor",
    config: dict[str, Any] | None = None,
    labels: dict[str, str] | None = None,
    model_file: str | None = None,
    calibration: Path | None = None,
    vocabulary: dict[str, int] | None = None,
) -> Path:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = folder / f"{name}{suffix}"
        save(weights)
        files = {
            "model-config.yaml": None if config is None else json.dumps(config),  # JSON is YAML
            "index_to_name.json": None if labels is None else json.dumps(labels),
            "model.py": model_file,
        }
        paths = {}
        for each, text in files.items():
            if text is not None:
                (folder / each).write_text(text)
                paths[each] = str(folder / each)
        extra = [paths["index_to_name.json"]] if labels is not None else []
        if vocabulary is not None:
            extra.append(str(folder / "source_vocab.pt"))
            torch.save(vocabulary, extra[-1])
        written = write_archive(
            ArchiverConfig(
                model_name=name,
                handler=handler,
                version=version,
                serialized_file=str(weights),
                model_file=paths.get("model.py"),
                extra_files=",".join(extra) or None,
                config_file=paths.get("model-config.yaml"),
                export_path=temporary,
                calibration=None if calibration is None else str(calibration),
            )
        )
        store.mkdir(parents=True, exist_ok=True)
        target = store / f"{file or name}.mar"
        target.write_bytes(written.read_bytes())
        return target


def write_linear(
    store: Path, name: str = "linear", *, version: str = "1.0", seed: int = 0, file: str | None = None
) -> Path:
    return write_torchscript(
        store, Linear(seed), name, version=version, file=file, config={"input": LINEAR_INPUT}
    )  # fmt: skip


def write_burn(store: Path, name: str = "burn") -> Path:
    return write_torchscript(store, Burn(), name, config={"input": {"dtype": "float32", "shape": [2]}})


def write_pictures(store: Path, name: str = "pictures") -> Path:
    return write_torchscript(store, Pictures(), name, handler="image_classifier", labels=LABELS)


def write_words(store: Path, name: str = "words") -> Path:
    labels = {"0": "praise", "1": "blame"}
    return write_torchscript(
        store, Words(), name, handler="text_classifier", labels=labels, vocabulary=VOCABULARY
    )  # fmt: skip


def write_pair(store: Path, name: str = "pair") -> Path:
    """Of whole numbers from 5 to 9, 8 to 64 of them, and a mask."""
    ids = {"name": "ids", "dtype": "int64", "shape": ["8..64"], "values": [5, 9], "same": "length"}
    mask = {"name": "mask", "dtype": "int64", "shape": ["8..64"], "values": [1, 1], "same": "length"}
    return write_torchscript(store, Pair(), name, config={"input": [ids, mask]})
