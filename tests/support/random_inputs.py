"""Inputs of random models: what model-config.yaml says of them, and items to ask with, right and wrong ones."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

SIZE_MAX = 33  # asked for where there is no known maximum
FREE = ("2..64", "..48", "1..20", "3..", "2..12")


@dataclass(frozen=True)
class Free:
    """A dimension whose size each request chooses; inputs that have it by one name come with one size."""

    name: str
    text: str  # as in model-config.yaml
    low: int
    high: int | None
    pad_to: tuple[int, ...] = ()

    def seen(self, size: int) -> int:
        """What the model sees of ``size``."""
        return next((each for each in self.pad_to if each >= size), size)


@dataclass(frozen=True)
class Input:
    name: str
    dtype: torch.dtype
    shape: tuple[int | Free, ...]
    vocabulary: int | None = None
    values: tuple[float, float] | None = None
    is_mask: bool = False

    @property
    def free(self) -> list[Free]:
        return [each for each in self.shape if isinstance(each, Free)]

    def entry(self, *, shares: bool) -> dict[str, Any]:
        """Its description in model-config.yaml; ``shares``: other inputs have its free dimensions too."""
        shape: list[Any] = []
        for each in self.shape:
            text = each.text if isinstance(each, Free) else each
            shape.append(-1 if text == "-1" else text)
        entry: dict[str, Any] = {"name": self.name, "dtype": str(self.dtype).removeprefix("torch."), "shape": shape}
        if self.free and self.free[0].pad_to:
            entry["pad_to"] = list(self.free[0].pad_to)
        if self.free and shares:
            names = [each.name for each in self.free]
            entry["same"] = names[0] if len(names) == 1 else names
        if self.vocabulary is not None:
            entry["vocabulary"] = self.vocabulary
        if self.values is not None:
            entry["values"] = list(self.values)
        return entry

    def sized(self, sizes: dict[str, int], batch: int = 1) -> list[int]:
        return [batch, *(sizes[each.name] if isinstance(each, Free) else each for each in self.shape)]

    def padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """As the documentation says: zeros behind, up to the next size of ``pad_to``."""
        for axis, each in enumerate(self.shape, 1):
            if isinstance(each, Free) and each.seen(tensor.shape[axis]) != tensor.shape[axis]:
                shape = list(tensor.shape)
                shape[axis] = each.seen(shape[axis]) - shape[axis]
                tensor = torch.cat([tensor, tensor.new_zeros(shape)], axis)
        return tensor


def draw_inputs(dice: random.Random) -> list[Input]:
    """One to three of them; the first is what the model is about."""
    first = _first(dice)
    inputs = [first]
    if isinstance(first.shape[0], Free) and len(first.shape) < 3 and dice.random() < 0.6:
        dtype = dice.choice([torch.int64, torch.bool, torch.float32, torch.int32])
        inputs.append(Input("mask", dtype, first.shape[:1], is_mask=True))
    while len(inputs) < 3 and dice.random() < 0.25:
        # A padded dimension is one input's only free one; a second input of that shape shares it.
        other = first.shape if dice.random() < 0.4 else (dice.randint(2, 5),)
        inputs.append(Input(f"more{len(inputs)}", _float(dice), other))
    return inputs


def _float(dice: random.Random) -> torch.dtype:
    return dice.choices([torch.float32, torch.float64, torch.float16], [12, 2, 1])[0]


def _first(dice: random.Random) -> Input:
    kind = dice.choice(["vector", "series", "sequence", "sequence", "picture", "tokens", "tokens", "numbers"])

    def length(name: str = "length", low: int = 4, *, pads: bool = False) -> int | Free:
        if dice.random() < 0.35:
            return dice.randint(low, 8)
        if pads and dice.random() < 0.35:
            return Free(name, "-1", 1, 32, (8, 16, 32))
        text = "-1" if dice.random() < 0.35 else dice.choice(FREE)
        least, _, most = text.partition("..")
        return Free(name, text, int(least) if least.isdigit() else 1, int(most) if most else None)

    if kind == "vector":
        values = dice.choice([None, None, None, (-5.0, 5.0)])
        return Input("x", _float(dice), (dice.randint(2, 6),), values=values)
    if kind == "series":
        return Input("x", _float(dice), (length(pads=True),))
    if kind == "sequence":
        return Input("x", _float(dice), (length(pads=True), dice.randint(2, 4)))
    if kind == "picture":
        return Input("x", _float(dice), (dice.randint(1, 3), length("height", 5), length("width", 5)))
    dtype = dice.choice([torch.int64, torch.int64, torch.int32])
    if kind == "tokens":
        return Input("ids", dtype, (length(pads=True),), vocabulary=dice.choice([None, 7, 50]))
    return Input("x", dtype, (dice.randint(2, 5),), values=dice.choice([None, (-3, 12)]))


def draw_sizes(dice: random.Random, inputs: list[Input]) -> dict[str, int]:
    """A size for each free dimension: the smallest, odd ones, the largest."""
    sizes = {}
    for each in (free for one in inputs for free in one.free):
        high = SIZE_MAX if each.high is None else each.high
        wanted = dice.choice([each.low, each.low + 1, 5, 8, 9, 17, SIZE_MAX, high])
        sizes[each.name] = min(max(wanted, each.low), high)
    return sizes


def draw_tensor(dice: random.Random, generator: torch.Generator, one: Input, shape: list[int]) -> torch.Tensor:
    """Numbers of some style within what the input allows."""
    style = dice.choice(["normal", "normal", "normal", "large", "tiny", "negative", "zeros", "constant"])
    if one.is_mask:
        length = dice.randint(0, shape[1])
        kept = {"normal": torch.arange(shape[1]) < length, "zeros": torch.zeros(shape[1])}.get(style)
        mask = torch.ones(shape[1]) if kept is None else kept
        return mask.expand(shape).to(one.dtype).contiguous()
    low, high = one.values or (None, None)
    if one.vocabulary is not None:
        low, high = 0, one.vocabulary - 1
    if not one.dtype.is_floating_point:
        first, last = (-4, 20) if low is None or high is None else (int(low), int(high))
        if style == "zeros":
            return torch.full(shape, max(0, first), dtype=one.dtype)
        if style == "constant":
            return torch.full(shape, last, dtype=one.dtype)
        scale = 10007 if style == "large" and low is None else 1
        return (torch.randint(first, last + 1, shape, generator=generator) * scale).to(one.dtype)
    numbers = torch.randn(shape, generator=generator)
    scales = {"large": 100.0, "tiny": 1e-3, "zeros": 0.0}
    numbers = numbers * scales.get(style, 1.0)
    if style == "negative":
        numbers = -numbers.abs() - 0.1
    if style == "constant":
        numbers = torch.full(shape, round(dice.uniform(-3, 3), 2))
    if low is not None:
        numbers = numbers.clamp(low, high)
    return numbers.to(one.dtype)


def offend(
    dice: random.Random, inputs: list[Input], tensors: tuple[torch.Tensor, ...]
) -> tuple[str, tuple[torch.Tensor, ...]] | None:
    """``tensors`` changed into what the description of ``inputs`` does not allow, and what that is."""
    ways = []
    for index, one in enumerate(inputs):
        tensor = tensors[index].clone()
        for axis, free in enumerate(one.shape, 1):
            if not isinstance(free, Free):
                continue
            shared = [other for other in inputs if other is not one and free in other.shape]
            if free.high is not None and not shared:
                ways.append((f"{one.name}: a size of {free.high + 1}", index, _longer(tensor, axis, free.high + 1)))
            if free.low > 1 and not shared:
                ways.append((f"{one.name}: a size of {free.low - 1}", index, tensor.narrow(axis, 0, free.low - 1)))
            if shared and tensor.shape[axis] > free.low:
                shorter = tensor.narrow(axis, 0, tensor.shape[axis] - 1)
                ways.append((f"{one.name}: shorter than {shared[0].name}", index, shorter))
        for limit in _beyond(one):
            wrong = tensor.clone()
            wrong.view(-1)[-1] = limit
            ways.append((f"{one.name}: a value of {limit}", index, wrong))
    if not ways:
        return None
    what, index, changed = dice.choice(ways)
    return what, (*tensors[:index], changed.contiguous(), *tensors[index + 1 :])


def _longer(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    return torch.cat([tensor] * (size // tensor.shape[axis] + 1), axis).narrow(axis, 0, size)


def _beyond(one: Input) -> list[float]:
    if one.vocabulary is not None:
        return [one.vocabulary, -1]
    return [] if one.values is None else [one.values[0] - 1, one.values[1] + 1]
