"""Whether a part of an answer is wrong that is small beside the rest of its tensor, and so hides in its difference.

Boxes in pixels and scores below one in a tensor: next to 640, a score that is 0.06 off is 1e-4 off, and at a lower
precision it may be any. So each part (a column, a channel, an anchor) is looked at by itself, beside what torch's own
rounding does to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# A part is wrong on a probe that is so many times as far off as torch's own rounding takes it, and by more than the
# tolerance of its own largest number. That many, as a part may be one number, and torch's off by little by chance.
_FARTHER = 16.0
# By chance torch is near in some parts of many; none counts as nearer than this share of them is.
_NEAREST = 0.1
# Probes that a part has to be wrong on before it counts: by chance it is on one.
_PROBES_MIN = 3
# Errors below this share of the tensor's largest number are nobody's: what is nearly zero may be any such number.
_SEEN = 1e-6
# Of dimensions that are longer nothing is kept; others of the tensor show the same.
_PARTS_MAX = 1 << 16


class SmallParts:
    """Args:
        tolerance: of `pyserve.proof.comparison.difference`.
        probes_min: that a part has to be wrong on before it counts.
        share: of the probes that a part is in, of which more have to be. At full precision 0: a fault that saturation,
            zeros or one place in a batch hides on most is one.
    """  # fmt: skip

    def __init__(self, tolerance: float, probes_min: int = _PROBES_MIN, share: float = 0.0):
        self._tolerance, self._probes_min, self._share = tolerance, probes_min, share
        self._probes: dict[tuple[int, int, int], torch.Tensor] = {}  # (place of the tensor, dimension, its size)
        self._wrong: dict[tuple[int, int, int], torch.Tensor] = {}

    def note(self, right: Any, rounded: Any, got: Any) -> bool:
        """The answers of one probe: the right one, that with torch's own rounding, and the one that is judged.

        With the right one in place of the second, every difference above the tolerance counts.

        Returns:
            whether a part looks wrong.
        """
        places = [leaves(each) for each in (right, rounded, got)]
        if len({len(each) for each in places}) > 1:
            return False
        is_any_wrong = False
        for place, (wanted, own, judged) in enumerate(zip(*places, strict=True)):
            is_plain = wanted.is_floating_point() and wanted.layout is torch.strided
            if is_plain and wanted.shape == own.shape == judged.shape and wanted.numel():
                is_any_wrong |= self._note(place, wanted, own, judged)
        return is_any_wrong

    def _note(self, place: int, right: torch.Tensor, own: torch.Tensor, judged: torch.Tensor) -> bool:
        right, own, judged = (each.cpu().double() for each in (right, own, judged))
        finite = right.isfinite() & own.isfinite() & judged.isfinite()
        scales = right.abs().where(finite, 0.0)
        errors = (judged - right).abs().where(finite, 0.0)
        owns = (own - right).abs().where(finite, 0.0)
        is_any_wrong = False
        for dimension in range(right.ndim):  # of the first, which is the batch, only all together
            size = right.shape[dimension] if dimension else 1
            if size > _PARTS_MAX:
                continue
            scale, error, rounding = (_largest(each, dimension) for each in (scales, errors, owns))
            nearest = rounding.sort().values[int(size * _NEAREST)]
            least = (self._tolerance * scale).clamp(min=_SEEN * float(scales.max()))
            is_wrong = (error > least) & (error > _FARTHER * rounding.clamp(min=float(nearest)))
            key = place, dimension, size
            none = torch.zeros(size, dtype=torch.int64)
            # NaN and infinities among the inputs leave nothing to compare in most networks.
            self._probes[key] = self._probes.get(key, none) + _largest(finite, dimension)
            self._wrong[key] = self._wrong.get(key, none) + is_wrong
            is_any_wrong |= bool(is_wrong.any())
        return is_any_wrong

    def confirmed(self, again: Iterable[tuple[Any, Any, Any]]) -> str:
        """As `objection`, of one that was told the right answer in place of the rounded one: at full precision rounding
        is next to nothing, and what it does is looked for only if there is something to explain.

        Args:
            again: the answers of probes on which a part looked wrong, as `note` takes them, made as they are asked for.
        """
        if not self.objection():
            return ""
        parts = SmallParts(self._tolerance, self._probes_min, self._share)
        for answers in again:
            parts.note(*answers)
        return parts.objection()

    def objection(self) -> str:
        """The part that is wrong on enough probes, in words; ``""`` if there is none."""
        for (place, dimension, _), wrong in self._wrong.items():
            probes = self._probes[place, dimension, wrong.numel()]
            counts = wrong * ((wrong >= self._probes_min) & (wrong > self._share * probes))
            part = int(counts.argmax())
            if count := int(counts[part]):
                where = f"number {part} of dimension {dimension}" if dimension else "all of it"
                return (
                    f"output {place + 1} is wrong in a part that is small beside the rest ({where}), on {count} of "
                    f"{int(probes[part])} inputs"
                )
        return ""


def leaves(output: Any) -> list[torch.Tensor]:
    """All tensors in an output, in order; numbers count as such."""
    if isinstance(output, torch.Tensor):
        return [output.detach()]
    if isinstance(output, float):
        return [torch.tensor(output, dtype=torch.float64)]
    if isinstance(output, dict):
        return [each for value in output.values() for each in leaves(value)]
    if isinstance(output, (list, tuple)):
        return [each for value in output for each in leaves(value)]
    return []


def _largest(numbers: torch.Tensor, dimension: int) -> torch.Tensor:
    """Of each place along ``dimension``, or of all for the first."""
    if not dimension:
        return numbers.amax().reshape(1)
    others = [each for each in range(numbers.ndim) if each != dimension]
    return numbers.amax(dim=others)
