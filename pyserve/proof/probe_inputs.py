"""Inputs made to disagree: what two ways to run one network are compared on.

One easy example proves nothing: a branch, a loop or a constant of the example's size shows only on other numbers, other
sizes and other batches. NaN and infinity are in `ProbeRows.not_finite` only. The same seed gives the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Sizes tried for a free dimension, as far as they are allowed; odd ones, and on both sides of powers of two.
FREE_SIZES = (1, 2, 5, 16, 17, 33, 40, 65)
# A free dimension is tried at its largest size too if that is not more than this.
LARGEST_SIZE_MAX = 512
# Batch size of the probes that are not of one item.
BATCH = 3

# How the numbers of an input are chosen.
VALUES = ("random", "negative", "zeros", "large", "tiny", "ones", "unit", "ends early", "constant", "alternating")

# Kind and scale of the rows of a batch, in order. The first has nothing but large numbers, so that what leaks from it
# into the second is seen.
_ROWS = (("bright", 1.0), ("zeros", 1.0), ("random", 30.0), ("ends early", 0.25), ("ones", 1.0), ("random", 1.0))

# Different items that batches are made of; larger batches repeat them.
ITEMS_MAX = 8
# By how much items that are nearly alike differ, as a share of each number.
_NEARLY = (1e-3, -1e-3)


@dataclass(frozen=True)
class InputDomain:
    """What one input may hold.

    Attributes:
        dtype: of the tensor.
        sizes: smallest and largest of each dimension, without the batch; None = no known maximum.
        values: smallest and largest number; None = as the dtype allows.
        same: one name per free dimension, in order, or empty: dimensions of one name have one size.
        pad_to: sizes of which the free dimension has one; empty for any.
    """

    dtype: torch.dtype
    sizes: tuple[tuple[int, int | None], ...]
    values: tuple[float, float] | None = None
    same: tuple[str, ...] = ()
    pad_to: tuple[int, ...] = ()

    @classmethod
    def of(cls, handler: Any, example: Sequence[torch.Tensor]) -> list[InputDomain]:
        """Of each input: as model-config.yaml describes it to the ``handler``, else the example's own shape."""
        own = getattr(handler, "_spec", None)  # of a handler that takes one input, where it is described
        specs = getattr(handler, "specs", None) or (() if own is None else (own,))
        if len(specs) != len(example):
            return [cls(each.dtype, tuple((size, size) for size in each.shape[1:])) for each in example]
        return [cls._of_spec(spec) for spec in specs]

    @classmethod
    def _of_spec(cls, spec: Any) -> InputDomain:
        largest = spec.pad_to[-1] if spec.pad_to else None
        sizes = getattr(spec, "sizes", None)
        if sizes is None:
            sizes = tuple((1, largest) if size == -1 else (size, size) for size in spec.shape)
        return cls(spec.torch_dtype, sizes, getattr(spec, "values", None), getattr(spec, "same", ()), spec.pad_to)

    @property
    def free(self) -> list[int]:
        """Which dimensions have more than one size, without the batch."""
        return [axis for axis, (low, high) in enumerate(self.sizes) if low != high]


@dataclass(frozen=True)
class Probe:
    """Inputs to run, each [n, ...].

    Attributes:
        name: what is special about them, for a person.
        may_fail: the numbers or sizes may lie outside of what the model takes, which nobody described.
    """

    name: str
    inputs: tuple[torch.Tensor, ...]
    may_fail: bool = False


def probe_inputs(example: Sequence[torch.Tensor], domains: Sequence[InputDomain], *, seed: int = 0) -> list[Probe]:
    """Probes of all kinds of numbers and sizes, batches of 1 and 3; those most likely to disagree first.

    Args:
        example: one item [1, ...] per input; its sizes are those of the probes about numbers.
        domains: one per input.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [tuple(each.shape[1:]) for each in example]
    probes: list[Probe] = []

    def add(
        name: str, batch: int, kinds: Sequence[str], item_shapes: Sequence[tuple[int, ...]], *, may_fail: bool
    ) -> None:
        inputs = tuple(
            _filled(domain, (batch, *shape), kind, generator)
            for domain, shape, kind in zip(domains, item_shapes, kinds, strict=True)
        )
        probes.append(Probe(f"{name}, batch {batch}", inputs, may_fail))

    count = len(domains)
    add("random numbers", BATCH, ["random"] * count, shapes, may_fail=False)
    for sizes in _free_sizes(example, domains):
        text = ", ".join("x".join(map(str, each)) for each in sizes)
        add(f"size {text}", BATCH if len(probes) % 2 else 1, ["random"] * count, sizes, may_fail=True)
    for number, kind in enumerate(VALUES[1:]):
        add(f"{kind} numbers", BATCH if number % 2 else 1, [kind] * count, shapes, may_fail=_is_unbounded(domains))
    if count > 1:
        for position in range(count):
            for kind in ("zeros", "ones", "ends early"):
                kinds = [kind if i == position else "random" for i in range(count)]
                add(f"{kind} in input {position + 1}", 1, kinds, shapes, may_fail=False)
    return probes


def batch_rows(
    example: Sequence[torch.Tensor], domains: Sequence[InputDomain], count: int, *, seed: int = 0
) -> list[tuple[torch.Tensor, ...]]:
    """``count`` items of the example's shape, each a tuple of tensors [1, ...], with different numbers.

    They differ in magnitude and in kind (all zero, all one, ending early), since what a batch has in common (a scale, a
    mean, a mask) shows only between unlike rows. Where there are several inputs, the later ones differ in kind.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    items = []
    for number in range(count):
        kind, scale = _ROWS[number % len(_ROWS)]
        row = []
        for position, (each, domain) in enumerate(zip(example, domains, strict=True)):
            is_plain = len(domains) > 1 and (position == 0) == (number < len(_ROWS))
            # An item of texts that is nothing but padding, or masked throughout, is none; torch's own operators have
            # been seen to end the process for one.
            may_be_empty = domain.dtype.is_floating_point or domain.dtype.is_complex
            is_empty = kind == "zeros" or (kind == "ones" and domain.dtype is torch.bool)
            own = "ends early" if is_empty and not may_be_empty else kind
            made = _filled(domain, tuple(each.shape), "random" if is_plain else own, generator)
            row.append(made * scale if domain.dtype.is_floating_point and domain.values is None else made)
        items.append(tuple(row))
    return items


@dataclass(frozen=True)
class ProbeRows:
    """Items to make batches of, each a tuple of tensors [1, ...] of one shape.

    Attributes:
        unlike: with numbers of different magnitudes and kinds.
        not_finite: one with NaN and one with infinities in every input that may hold any number; empty where none may.
        alike: one, and others that differ from it by a thousandth or in one whole number.
    """

    unlike: list[tuple[torch.Tensor, ...]]
    not_finite: list[tuple[torch.Tensor, ...]]
    alike: list[tuple[torch.Tensor, ...]]

    @property
    def items(self) -> list[tuple[torch.Tensor, ...]]:
        """All of them, in the order of the attributes."""
        return [*self.unlike, *self.not_finite, *self.alike]


def probe_rows(example: Sequence[torch.Tensor], domains: Sequence[InputDomain], *, seed: int = 0) -> ProbeRows:
    """Items of the example's shape for batches in which one item may change another's answer.

    Unlike items never meet where only like ones do (a place for each group that is full, copies that are dropped), and
    finite numbers times zero never show what NaN times zero does.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    first = tuple(_filled(domain, tuple(each.shape), "random", generator)
                  for each, domain in zip(example, domains, strict=True))  # fmt: skip
    nearly = [tuple(_nearly(each, domain, share) for each, domain in zip(first, domains, strict=True))
              for share in _NEARLY]  # fmt: skip
    takes_any = [domain.dtype.is_floating_point and domain.values is None for domain in domains]
    # In all of an input: where single ones come out depends on how a convolution is computed, not on the batch alone.
    not_finite = [
        tuple(torch.full_like(each, number) if is_any else each.clone()
              for each, is_any in zip(first, takes_any, strict=True))
        for number in (float("nan"), float("inf")) if any(takes_any)
    ]  # fmt: skip
    return ProbeRows(batch_rows(example, domains, ITEMS_MAX, seed=seed), not_finite, [first, *nearly])


def other_examples(
    example: Sequence[torch.Tensor], domains: Sequence[InputDomain], count: int
) -> list[list[torch.Tensor]]:
    """At most ``count`` examples like this one, whose free dimensions have other sizes; the largest come first."""
    shapes = _free_sizes(example, domains)
    return [
        [each.new_zeros((1, *shape)) for each, shape in zip(example, chosen, strict=True)]
        for chosen in sorted(shapes, key=lambda each: -sum(map(math.prod, each)))[:count]
    ]


def largest_example(example: Sequence[torch.Tensor], domains: Sequence[InputDomain]) -> list[torch.Tensor] | None:
    """An example like this one with its free dimensions at their largest size, as far as that is tried; None if it has
    none that is larger. All numbers of an input are the example's first."""  # fmt: skip
    own = [tuple(each.shape[1:]) for each in example]
    largest = max([own, *_free_sizes(example, domains)], key=lambda shapes: sum(map(math.prod, shapes)))
    if largest == own:
        return None
    return [_resized(each, shape) for each, shape in zip(example, largest, strict=True)]


def padded_examples(
    example: Sequence[torch.Tensor], domains: Sequence[InputDomain]
) -> list[tuple[list[torch.Tensor], str]]:
    """Examples like this one of every size that items are filled up to, but for its own, and what each is called.

    Inputs that are filled up together have their n-th size together. All numbers of an input are the example's first,
    since an item of nothing but padding is none.
    """
    own = [tuple(each.shape[1:]) for each in example]
    longest = max((len(domain.pad_to) for domain in domains), default=0)
    found: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for step in range(longest):
        sizes = [domain.pad_to[min(step, len(domain.pad_to) - 1)] if domain.pad_to else 0 for domain in domains]
        shapes = tuple(_with_size(domain, shape, size) for domain, shape, size in zip(domains, own, sizes, strict=True))
        if list(shapes) != own:
            found.setdefault(shapes, [size for size in sizes if size])
    return [
        (
            [_resized(each, shape) for each, shape in zip(example, shapes, strict=True)],
            f"pad_to {', '.join(map(str, dict.fromkeys(sizes)))}",
        )
        for shapes, sizes in found.items()
    ]


def _with_size(domain: InputDomain, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """``shape`` with ``size`` for what is filled up."""
    if not domain.pad_to:
        return shape
    resized = list(shape)
    for axis in domain.free:
        resized[axis] = size
    return tuple(resized)


def _resized(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return tensor.flatten()[:1].expand((1, *shape)).clone() if tensor.numel() else tensor.new_zeros((1, *shape))


def _nearly(tensor: torch.Tensor, domain: InputDomain, share: float) -> torch.Tensor:
    """``tensor``, a little off: each number by ``share`` of it, or one whole number by one; inside the domain."""
    if domain.dtype.is_floating_point or domain.dtype.is_complex:
        moved = tensor * (1 + share)
        return moved if domain.values is None else moved.clamp(*domain.values)
    moved = tensor.clone()
    if moved.numel():
        at = moved.view(-1)[-1 if share > 0 else 0]
        low, high = domain.values if domain.values is not None else (0, 1)
        at.fill_(int(at) - 1 if int(at) > low else min(int(at) + 1, int(high)))
    return moved


def _is_unbounded(domains: Sequence[InputDomain]) -> bool:
    return any(domain.values is None and not domain.dtype.is_floating_point for domain in domains)


def _filled(domain: InputDomain, shape: tuple[int, ...], kind: str, generator: torch.Generator) -> torch.Tensor:
    """A tensor of this shape whose numbers are of one of `VALUES`, moved into the domain's range."""
    if domain.dtype is torch.bool:
        return _whole_numbers(shape, kind, 0, 1, generator).to(torch.bool)
    if domain.dtype.is_complex:
        parts = [_filled(InputDomain(torch.float64, domain.sizes), shape, kind, generator) for _ in range(2)]
        return torch.complex(*parts).to(domain.dtype)
    if not domain.dtype.is_floating_point:
        bounds = torch.iinfo(domain.dtype)
        # Without a known vocabulary, a table of two rows has to do; larger numbers are tried on their own.
        low, high = domain.values if domain.values is not None else (0, 1)
        if domain.values is None and kind in ("negative", "large", "constant"):
            low, high = {"negative": (-3, -1), "large": (2, 100), "constant": (2, 9)}[kind]
        low = max(int(low), bounds.min)
        high = max(low, min(int(high), bounds.max))
        return _whole_numbers(shape, kind, low, high, generator).to(domain.dtype)
    numbers = _floats(shape, kind, generator)
    if domain.values is not None:
        low, high = domain.values
        # Uniform in the range: squeezed numbers would all lie at its ends.
        numbers = numbers.clamp(low, high) if kind != "random" else low + (high - low) * torch.sigmoid(2 * numbers)
    largest = torch.finfo(domain.dtype).max
    return numbers.double().clamp(-largest, largest).to(domain.dtype)


def _floats(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> torch.Tensor:
    def normal() -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "ones":
        return torch.ones(shape)
    if kind == "negative":
        return -3 * normal().abs()
    if kind == "large":
        return 1e4 * normal()
    if kind == "tiny":
        return 1e-6 * normal()
    if kind == "unit":
        return torch.rand(shape, generator=generator)
    if kind == "constant":
        return torch.full(shape, 37.5)
    if kind == "alternating":
        return 255 * (torch.rand(shape, generator=generator) < 0.5).float()
    if kind == "ends early":
        return normal() * _begins(shape)
    if kind == "bright":
        return 64 + 191 * torch.rand(shape, generator=generator)
    return 2 * normal()


def _whole_numbers(shape: tuple[int, ...], kind: str, low: int, high: int, generator: torch.Generator) -> torch.Tensor:
    def between(first: int, last: int) -> torch.Tensor:
        return torch.randint(first, last + 1, shape, generator=generator)

    lowest = min(max(0, low), high)  # zero if that is allowed
    if kind == "zeros":
        return torch.full(shape, lowest)
    if kind == "ones":
        return torch.full(shape, min(lowest + 1, high))
    if kind == "large":
        return between(max(low, high - 3), high)
    if kind in ("tiny", "unit", "alternating"):
        return between(lowest, min(lowest + 1, high))
    if kind == "constant":
        return torch.full(shape, (low + high) // 2)
    if kind == "ends early":
        begins = _begins(shape)
        return torch.where(begins > 0, between(min(lowest + 1, high), high), torch.full(shape, lowest))
    return between(low, high)


def _begins(shape: tuple[int, ...]) -> torch.Tensor:
    """1 at the start of each item, else 0: one, two or three quarters of its first dimension."""
    kept = torch.zeros(shape)
    if len(shape) < 2:
        return kept
    for row in range(shape[0]):
        kept[row, : max(1, (shape[1] * (row % 3 + 1)) // 4)] = 1
    return kept


def _free_sizes(example: Sequence[torch.Tensor], domains: Sequence[InputDomain]) -> list[list[tuple[int, ...]]]:
    """Shapes, one per input, that differ from the example's in their free dimensions."""
    choices = _choices(domains)
    if not choices:
        return []
    found: list[list[tuple[int, ...]]] = []
    own = [tuple(each.shape[1:]) for each in example]
    longest = max(len(sizes) for sizes in choices.values())
    names = list(choices)
    for step in range(longest):
        # All dimensions at their n-th size, and then (if there are several) each next one at another size.
        for shift in range(min(len(names), 2)):
            chosen = {name: sizes[(step + shift * i) % len(sizes)] for i, (name, sizes) in enumerate(choices.items())}
            shapes = [_shape(domain, chosen, shape) for domain, shape in zip(domains, own, strict=True)]
            if shapes != own and shapes not in found:
                found.append(shapes)
    return found


def _dimension_name(domain: InputDomain, position: int) -> str:
    """Free dimensions of one name are probed at one size; without names, those that stand at the same place."""
    return domain.same[position] if position < len(domain.same) and domain.same[position] else f"#{position}"


def _choices(domains: Sequence[InputDomain]) -> dict[str, list[int]]:
    choices: dict[str, list[int]] = {}
    for domain in domains:
        for position, axis in enumerate(domain.free):
            low, high = domain.sizes[axis]
            sizes = list(domain.pad_to) or sorted({
                low, *(size for size in FREE_SIZES if size >= low and (high is None or size <= high)),
                *([high] if high is not None and high <= LARGEST_SIZE_MAX else []),
            })  # fmt: skip
            if not domain.pad_to and high is None and low > FREE_SIZES[-1]:
                sizes += [low + 1, low + 24]
            name = _dimension_name(domain, position)
            both = [size for size in choices.get(name, sizes) if size in sizes]
            choices[name] = both or sizes
    return choices


def _shape(domain: InputDomain, chosen: dict[str, int], own: tuple[int, ...]) -> tuple[int, ...]:
    shape = list(own)
    for position, axis in enumerate(domain.free):
        shape[axis] = chosen[_dimension_name(domain, position)]
    return tuple(shape)
