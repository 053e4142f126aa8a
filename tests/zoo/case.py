"""What a model of the zoo is, and in how many ways it can be served."""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# One request: the model's inputs, each [1, ...].
Item = tuple[torch.Tensor, ...]
Items = Callable[[torch.Generator], list[Item]]

HEADER = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n"

# How a model reaches the server: its class and a state dict; TorchScript, scripted or traced; a program of
# torch.export; a package of AOTInductor.
BACKENDS = ("eager", "scripted", "traced", "exported", "compiled")


@dataclass(frozen=True)
class Case:
    """One model that a server may get wrong.

    Attributes:
        name: unique, a model name that the server takes.
        trap: what tempts a server to a wrong answer, in a few words.
        source: the model file, with one class that takes no arguments.
        inputs: the entries of ``input:`` in model-config.yaml.
        items: makes the requests; what the class itself refuses must be refused by the server too.
        backends: how it can be served truly; those of TorchScript and torch.export are checked before they are packed.
        may_refuse: backends whose registration, or any request, may be answered with an error. Every other one must
            answer what the class answers.
        dynamic: ``dynamic_shapes`` of torch.export, one entry per input; None for what torch does by default.
        example: picks the inputs that torch.export and the tracer see; by default the first item.
        likely: for random models: "" if an output could be a draw for an item, else what is wrong with it.
        varies: two answers to one request must differ.
        precisions: all in which it is tried.
        rounding: the largest difference that is rounding, where it is not that of the output's dtype.
        mixed: requests sent at once, per number of workers.
        is_pure: the class is known to keep nothing, so that one model of it may answer all items.
        config: further keys of model-config.yaml.
    """

    name: str
    trap: str
    source: str
    inputs: tuple[dict[str, Any], ...]
    items: Items
    backends: tuple[str, ...] = ("eager",)
    may_refuse: tuple[str, ...] = ()
    dynamic: tuple[Any, ...] | None = None
    example: Callable[[list[Item]], Item] | None = None
    likely: Callable[[Item, Any], str] | None = None
    varies: bool = False
    precisions: tuple[str, ...] = ("fp32",)
    rounding: float | None = None
    mixed: int = 48
    is_pure: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The model file."""
        return HEADER + textwrap.dedent(self.source).strip() + "\n"

    def requests(self) -> list[Item]:
        """The same ones each time."""
        return self.items(torch.Generator().manual_seed(zlib.crc32(self.name.encode())))


@dataclass(frozen=True)
class Variant:
    """One way to serve a case.

    Attributes:
        conversion: `conversion:` in model-config.yaml; "" leaves it to the server.
        workers: tried one after the other on the same loaded model.
    """

    backend: str = "eager"
    conversion: str = ""
    precision: str = "fp32"
    workers: tuple[int, ...] = (1, 2)
    batch_size: int = 8

    def __str__(self) -> str:
        parts = [self.backend, self.conversion, "" if self.precision == "fp32" else self.precision]
        return "-".join(filter(None, parts)) + ("" if self.batch_size == 8 else f"-batch{self.batch_size}")


def tensor(*shape: int | str, dtype: str = "float32", name: str = "", **more: Any) -> dict[str, Any]:
    """An entry of ``input:``; further keys as model-config.yaml has them."""
    entry: dict[str, Any] = {"dtype": dtype, "shape": list(shape), **more}
    return {"name": name, **entry} if name else entry


def floats(*shape: int, scales: tuple[float, ...] = (1, 1, 10, 100, 0.01, 1000)) -> Items:
    """Items of one input with normal numbers, one per scale, and one of zeros."""

    def make(generator: torch.Generator) -> list[Item]:
        drawn = [(torch.randn(1, *shape, generator=generator) * scale,) for scale in scales]
        return [*drawn, (torch.zeros(1, *shape),)]

    return make


def lengths(*sizes: int, width: int = 4) -> Items:
    """Items of one input [1, size, width] of normal numbers, one per size."""
    return lambda generator: [(torch.randn(1, size, width, generator=generator),) for size in sizes]


def whole(low: int, high: int, *sizes: int) -> Items:
    """Items of one input of whole numbers from low to high, both possible: [1, size], one per size."""
    return lambda generator: [(torch.randint(low, high + 1, (1, size), generator=generator),) for size in sizes]
