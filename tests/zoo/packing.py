"""Archives of the zoo's models, one per case and variant."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import threading
from pathlib import Path

import torch
from torch import nn

from pyserve.archive.packing import ArchiverConfig, write_archive

from . import reference
from .case import Case, Item, Variant
from .judging import difference

# Batches form only while workers are busy, and these models are quick: without waiting nothing would be mixed.
BATCHING = {"minBatch": 6, "maxBatchDelay": 20}

# torch's random numbers are the process's: two threads that build models would seed each other's. And two variants of
# one case share its files.
BUILDING = threading.Lock()


class Untrue(Exception):
    """A conversion made here is not what the class computes: the archive would be the author's mistake."""


class Packed:
    """The files of one case in a folder: its class, its weights, and archives made of them."""

    def __init__(self, case: Case, folder: Path, compiled: Path):
        """``compiled`` is where packages of AOTInductor are kept from one run to the next."""
        self.case = case
        self.folder = folder / case.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.source = self.folder / "model.py"
        self.source.write_text(case.text)
        self.weights = self.folder / "weights.pth"
        with BUILDING:
            self.model = reference.saved(self.source, self.weights)
        self._compiled = compiled

    @functools.cached_property
    def right_answers(self) -> list[object]:
        """Per request of the case what `reference.right_answers` says."""
        return reference.right_answers(self.source, self.weights, self.case)

    def archive(self, variant: Variant, name: str, store: Path) -> Path:
        """``store/{name}.mar``.

        Raises:
            Untrue: TorchScript or torch.export cannot express the model as it is.
        """
        with BUILDING:
            return Path(shutil.move(self._written(variant, name), store / f"{name}.mar"))

    def _written(self, variant: Variant, name: str) -> Path:
        _ = self.right_answers  # here, where no other thread draws random numbers
        is_eager = variant.backend == "eager"
        entries = list(self.case.inputs)
        config = {
            "input": entries if len(entries) > 1 else entries[0],
            "batchSize": variant.batch_size,
            **(BATCHING if variant.batch_size > 1 else {}),
            **({"conversion": variant.conversion} if variant.conversion else {}),
            **({"precision": variant.precision} if variant.precision != "fp32" else {}),
            **self.case.config,
        }
        config_file = self.folder / "model-config.yaml"
        config_file.write_text(json.dumps(config))
        weights = self.weights if is_eager else self._converted(variant.backend)
        has_weights = not is_eager or bool(self.model.state_dict())
        return write_archive(
            ArchiverConfig(
                name, "tensor", serialized_file=str(weights) if has_weights else None, config_file=str(config_file),
                model_file=str(self.source) if is_eager else None, export_path=str(self.folder), force=True,
            )
        )  # fmt: skip

    def _converted(self, backend: str) -> Path:
        path = self.folder / (f"{backend}.pt2" if backend in ("exported", "compiled") else f"{backend}.pt")
        if not path.exists():
            example = (self.case.example or (lambda items: items[0]))(self.case.requests())
            convert = {"scripted": _script, "traced": _trace, "exported": _export, "compiled": self._compile}[backend]
            with torch.no_grad():
                convert(self, example, path)
        return path

    def fresh(self) -> nn.Module:
        return reference.rebuilt(self.source, self.weights)

    def _compile(self, _: Packed, example: Item, path: Path) -> None:
        asked = (self.case.text, self.case.dynamic, [each.shape for each in example], torch.__version__)
        key = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
        kept = self._compiled / f"{key}.pt2"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            program = torch.export.export(self.fresh(), example, dynamic_shapes=self.case.dynamic)
            torch._inductor.aoti_compile_and_package(program, package_path=str(kept))
        shutil.copy(kept, path)


def _script(packed: Packed, _: Item, path: Path) -> None:
    script = torch.jit.script(packed.fresh())
    _check_true(packed, torch.jit.script(packed.fresh()))
    torch.jit.save(script, str(path))


def _trace(packed: Packed, example: Item, path: Path) -> None:
    trace = torch.jit.trace(packed.fresh(), tuple(each.clone() for each in example), check_trace=False)
    _check_true(packed, trace)
    torch.jit.save(trace, str(path))


def _export(packed: Packed, example: Item, path: Path) -> None:
    torch.export.save(torch.export.export(packed.fresh(), example, dynamic_shapes=packed.case.dynamic), str(path))


def _check_true(packed: Packed, converted: nn.Module) -> None:
    """Compared where the class answers and draws nothing. Raises Untrue."""
    if packed.case.likely is not None:
        return
    for item, right in zip(packed.case.requests(), packed.right_answers, strict=True):
        if isinstance(right, reference.Refused):
            continue
        worst = difference(right, converted(*(each.clone() for each in item)))
        if worst > 1e-5:
            raise Untrue(f"{packed.case.name} differs by {worst:.1e} from its class when converted by its author")
