"""Which of several backends runs a model fastest among those that give the same answers: compared, measured, chosen.

Everything is measured in one thread and in turns, so that whatever else the machine does meets all of them alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from pyserve.proof.agreement import Precisions, Run, agreement
from pyserve.proof.comparison import ROUNDING
from pyserve.proof.probe_inputs import ITEMS_MAX, InputDomain, Probe, batch_rows, largest_example, probe_inputs
from pyserve.torch_error import cause_of

TRIAL_DEFAULT_S = 20
# What is served at first.
STANDING = "torchscript"
# Times of one machine differ by this much from run to run: what is quicker by less is not quicker.
NOISE = 0.05
# Turns that are measured: with fewer nothing is believed, and more say nothing new.
ROUNDS_MIN = 3
ROUNDS_MAX = 15
_LARGEST = 0  # in place of the size of a batch: one item of the largest size
# How much of the time comparing may take; some probes are compared however long they take.
COMPARING_SHARE = 0.5
PROBES_MIN = 4
# Batches of up to so many are compared; that larger ones change nothing is `BatchProof`'s to show.
COMPARED_MAX = 16
# Why one is refused though nothing is against it: another time there may be enough.
NO_TIME = "there was no time to measure it; raise backendTrialSeconds in model-config.yaml"


class Runs(Protocol):
    """A `_core.TorchModel`, or a `Network`."""

    def run(self, inputs: list[torch.Tensor], /) -> Any: ...


@dataclass(frozen=True)
class Tried:
    """A backend that was compared and measured.

    Attributes:
        backend: its name, such as ``openvino``.
        batch_1_ms: the shortest run of one item, in ms; infinity if none was measured.
        batch_max_ms: the shortest run of a batch of ``batch_max`` items, in ms; infinity if none was measured.
        batch_max: the largest batch that could be measured in time.
        difference: the largest one to TorchScript, relative, as `pyserve.proof.comparison.difference` counts.
        probes: inputs that it was compared on.
        refused: why it is not to be used; ``""`` if it may be.
        largest_ms: the shortest run of one item at the largest size that free dimensions are tried at, in ms; infinity
            if the model has none, or there was no time.
    """

    backend: str
    batch_1_ms: float = math.inf
    batch_max_ms: float = math.inf
    batch_max: int = 1
    difference: float = 0.0
    probes: int = 0
    refused: str = ""
    largest_ms: float = math.inf


def try_backends(
    candidates: Mapping[str, Runs],
    truth: Runs,
    example: Sequence[torch.Tensor],
    domains: Sequence[InputDomain],
    *,
    batch_size: int,
    limit_s: float,
    standing: str = STANDING,
    tolerances: Mapping[str, float] | None = None,
    precisions: Precisions | None = None,
    exact: Run | None = None,
    is_over: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Tried]:
    """Compares each of ``candidates`` with ``truth`` on inputs made to disagree, and measures those that agree.

    Args:
        candidates: by their names; ``standing`` is among them, and is not compared.
        truth: what gives the right answers: the plain TorchScript.
        example: one item, [1, ...] per input.
        domains: what each input may hold.
        batch_size: the largest batch that may be run.
        limit_s: for all of it, in seconds. A run that has begun is not cut short.
        standing: what is served now, and was shown to agree before.
        tolerances: name -> what it may differ by; fp32's rounding for those that are not named.
        precisions, exact: see `agreement`.
        is_over: nobody wants to know any more.

    Returns:
        one for each candidate, in their order.
    """
    timer = _Timer(limit_s, is_over, clock)
    found = {name: Tried(name) for name in candidates}
    if limit_s > 0:
        others = {name: candidate for name, candidate in candidates.items() if name != standing}
        probes, expected = probes_of(example, domains, batch_size), dict[int, Any]()
        for number, (name, candidate) in enumerate(others.items(), 1):
            compared = agreement(
                truth.run, candidate.run, probes, (tolerances or {}).get(name, ROUNDING["fp32"]),
                is_enough=partial(timer.is_enough, COMPARING_SHARE * number / len(others)), expected=expected,
                precisions=precisions, exact=exact,
            )  # fmt: skip
            found[name] = Tried(
                name, difference=compared.difference, probes=compared.probes, refused=compared.objection
            )
    agreeing = {name: candidate for name, candidate in candidates.items() if not found[name].refused}
    if len(agreeing) > 1:  # else there is nothing to choose
        for name, each in _measured(agreeing, example, domains, batch_size, timer).items():
            found[name] = replace(each, difference=found[name].difference, probes=found[name].probes)
    return list(found.values())


class _Timer:
    """How much of a trial's time is over."""

    def __init__(self, limit_s: float, is_over: Callable[[], bool], clock: Callable[[], float]):
        self.now = clock
        self._limit_s, self._is_over, self._began = limit_s, is_over, clock()

    @property
    def left_s(self) -> float:
        return self._limit_s - (self.now() - self._began)

    def is_late(self, share: float = 1.0) -> bool:
        """Whether this share of the time is over, or all of the trial."""
        return self._is_over() or self.now() - self._began >= self._limit_s * share

    def is_enough(self, share: float, count: int) -> bool:
        """Whether no more probes are to be compared than ``count``."""
        return self._is_over() or (count >= PROBES_MIN and self.is_late(share))


def probes_of(example: Sequence[torch.Tensor], domains: Sequence[InputDomain], batch_size: int) -> list[Probe]:
    """What a backend is compared on: numbers and sizes of all kinds, NaN and infinities, and a large batch."""
    first, *others = probe_inputs(example, domains)
    rows = batch_rows(example, domains, ITEMS_MAX)
    size = min(batch_size, COMPARED_MAX)
    largest = Probe(f"a batch of {size}", _batch(rows, size))
    takes_any = [domain.dtype.is_floating_point and domain.values is None for domain in domains]
    odd = [
        Probe(f"{number} among its numbers", _with(example, takes_any, number), may_fail=True)
        for number in (math.nan, math.inf, 1e30) if any(takes_any)
    ]  # fmt: skip
    return [first, *([largest] if batch_size > 1 else []), *odd, *others]


def _batch(rows: Sequence[Sequence[torch.Tensor]], size: int) -> tuple[torch.Tensor, ...]:
    chosen = [rows[number % len(rows)] for number in range(size)]
    return tuple(torch.cat(list(column)) for column in zip(*chosen, strict=True))


def _with(example: Sequence[torch.Tensor], takes_any: Sequence[bool], number: float) -> tuple[torch.Tensor, ...]:
    """The example with ``number`` at one place of each input that may hold any."""
    made = tuple(each.clone() for each in example)
    for each, is_any in zip(made, takes_any, strict=True):
        if is_any and each.numel():
            each.view(-1)[each.numel() // 2] = min(number, torch.finfo(each.dtype).max) if number == 1e30 else number
    return made


# --- measuring --------------------------------------------------------------------------------------------------------


def _measured(
    candidates: Mapping[str, Runs], example: Sequence[torch.Tensor], domains: Sequence[InputDomain], batch_size: int,
    timer: _Timer,
) -> dict[str, Tried]:  # fmt: skip
    """The shortest run of each: of one item, of the largest batch that leaves time for all, and of an item of the
    largest size, which may have another winner."""  # fmt: skip
    measuring = _Measuring(candidates, timer)
    batches = {1: list(example)}
    measuring.rounds(batches, 1)
    once = measuring.once_s(1)
    largest = largest_example(example, domains)
    if largest is not None:
        measuring.rounds({_LARGEST: largest}, 1)
        if (once + measuring.once_s(_LARGEST)) * (ROUNDS_MIN + 1) < timer.left_s:
            batches[_LARGEST] = largest
    rounds_s = timer.left_s / (ROUNDS_MIN + 1) - (measuring.once_s(_LARGEST) if _LARGEST in batches else 0)
    size = _affordable(batch_size, rounds_s / max(once, 1e-6) - 1)
    if size > 1:
        batches[size] = list(_batch(batch_rows(example, domains, ITEMS_MAX), size))
    measuring.rounds(batches, ROUNDS_MAX + 1)
    return {name: _summed_up(name, each, size, batches.keys()) for name, each in measuring.found.items()}


def _affordable(batch_size: int, items: float) -> int:
    """``batch_size``, or the largest power of two below it that is at most ``items``."""
    return batch_size if batch_size <= items else 1 << max(0, int(max(items, 1)).bit_length() - 1)


@dataclass
class _Times:
    """Of one backend.

    Attributes:
        values: size of the batch, or `_LARGEST` -> how long each run took, in s, in order.
        failure: why it is not run any more.
    """

    values: dict[int, list[float]] = field(default_factory=dict)
    failure: str = ""


class _Measuring:
    """Rounds in which each runs each batch once, in another order every time."""

    def __init__(self, candidates: Mapping[str, Runs], timer: _Timer):
        self._candidates, self._timer = candidates, timer
        self.found = {name: _Times() for name in candidates}

    def once_s(self, key: int) -> float:
        """How long all together take for one run each."""
        return sum(min(each.values.get(key, [0.0])) for each in self.found.values())

    def rounds(self, batches: Mapping[int, list[torch.Tensor]], count: int) -> None:
        names = list(self._candidates)
        for number in range(count):
            first = number % len(names)
            for key, inputs in batches.items():
                for name in names[first:] + names[:first]:
                    if self._timer.is_late():
                        return
                    if not self.found[name].failure:
                        self._run(name, key, inputs)

    def _run(self, name: str, key: int, inputs: list[torch.Tensor]) -> None:
        began = self._timer.now()
        try:
            self._candidates[name].run(inputs)
        except Exception as error:  # whatever a backend raises
            what = "an item of the largest size" if key == _LARGEST else f"a batch of {key}"
            self.found[name].failure = f"it fails for {what}: {cause_of(str(error)) or type(error).__name__}"
            return
        self.found[name].values.setdefault(key, []).append(self._timer.now() - began)


def _summed_up(name: str, times: _Times, size: int, measured: Iterable[int]) -> Tried:
    """The first run of each size warms up, and counts for nothing. Of the others the shortest counts: what else the
    machine does only ever makes a run longer.
    """
    shortest = {each: min(values[1:]) * 1e3 for each, values in times.values.items() if len(values) > ROUNDS_MIN}
    late = "" if shortest.keys() >= set(measured) else NO_TIME
    ms = [shortest.get(each, math.inf) for each in (1, size, _LARGEST)]
    return Tried(name, ms[0], ms[1], size, refused=times.failure or late, largest_ms=ms[2])


# --- choosing ---------------------------------------------------------------------------------------------------------


def choose(tried: Sequence[Tried], standing: str = STANDING) -> tuple[str, str]:
    """(name, reason) of what is to run the model: the quickest that was not refused, if it is quicker than ``standing``
    by more than noise, and slower at no size by more than that. The reason is for a person.
    """
    own = next((each for each in tried if each.backend == standing), None)
    if own is None or own.refused:
        why = f": {own.refused}" if own is not None else ""
        return standing, f"{standing} was not measured{why}"
    better = [each for each in tried if not each.refused and each is not own and _is_quicker(each, own)]
    if better:
        best = min(better, key=lambda each: _ratio(each, own))
        return best.backend, f"{_times(best)}; {standing}: {_times(own)}"
    others = [each for each in tried if each is not own]
    refused = [f"{each.backend} is left out: {each.refused}" for each in others if each.refused]
    slower = [each for each in others if not each.refused]
    if slower:
        whose = f"{slower[0].backend} is not" if len(slower) == 1 else "none is"
        said = f"{whose} quicker by more than {NOISE:.0%}"
        times = [f"{each.backend}: {_times(each)}" for each in (own, *slower)]
        return standing, "; ".join([said, *times, *refused])
    return standing, "; ".join(refused) or "there is nothing else to run it on"


def _is_quicker(candidate: Tried, standing: Tried) -> bool:
    parts = _ratios(candidate, standing)
    return _ratio(candidate, standing) < 1 - NOISE and max(parts) <= 1 + NOISE


def _ratio(candidate: Tried, standing: Tried) -> float:
    """How long it takes, as a share of the other: the geometric mean of what both were measured at."""
    parts = _ratios(candidate, standing)
    return math.prod(parts) ** (1 / len(parts))


def _ratios(candidate: Tried, standing: Tried) -> list[float]:
    pairs = [
        (candidate.batch_1_ms, standing.batch_1_ms), (candidate.batch_max_ms, standing.batch_max_ms),
        (candidate.largest_ms, standing.largest_ms),
    ]  # fmt: skip
    return [own / other for own, other in pairs if math.isfinite(other)]


def _times(tried: Tried) -> str:
    """``"17.5 ms for one item, 120 ms for 8, 60 ms for one of the largest size"``."""
    parts = [f"{tried.batch_1_ms:.3g} ms for one item"]
    if tried.batch_max > 1:
        parts.append(f"{tried.batch_max_ms:.3g} ms for {tried.batch_max}")
    if math.isfinite(tried.largest_ms):
        parts.append(f"{tried.largest_ms:.3g} ms for one of the largest size")
    return ", ".join(parts)
