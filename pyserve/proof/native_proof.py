"""What is shown of a network in the native engine before it is believed: optimisations, state and batches.

Whatever cannot be shown falls back to the slower way that needs no proof: the graph as it is, a model per worker, one
item per batch. Runs at load, in a thread of its own; larger batches than could be tried in time stay unused until they
have been.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pyserve.proof.batch_probe import BatchProbe, Run, Step, outcome, size_step, steps
from pyserve.proof.comparison import ROUNDING, difference, rows
from pyserve.proof.probe_inputs import ITEMS_MAX, InputDomain, ProbeRows, batch_rows, probe_inputs
from pyserve.torch_error import cause_of

log = logging.getLogger(__name__)

# Probes of an optimisation end when they have taken this long, but so many are run.
OPTIMIZATION_BUDGET_S = 0.3
OPTIMIZATION_PROBES_MIN = 3
# Probes of batches go on behind the first requests when they have taken this long.
BUDGET_S = 1.0
# The engine runs numbers above this without its optimisations: `ordinary_max` of csrc/magnitude.h.
ORDINARY_MAX = 1e6
# From here on rounding alone can turn the numbers of two ways to compute into anything; but neither way may hide an
# overflow that the other shows.
_LARGE_MIN = 1e3

_ALLOW_FIX = "write 'batchDependent: allowed' in model-config.yaml if that is meant"


@dataclass
class BatchProof:
    """How many items of a model may share a batch.

    Args:
        run: the model: tensors [n, ...] -> its output.
        rows: to make batches of.
        tolerance: of `pyserve.proof.comparison.difference`.
        rows_max: the most that the program takes; None for any number.
        is_allowed: model-config.yaml says that answers may depend on the batch.
        others: rows of other shapes, of which a pair and three are tried.
        look: why they do as far as the model's code shows, ``""`` if it does not; asked before anything is tried.

    Attributes:
        size_max: the largest size that was shown to change nothing, 1 at first; grows while sizes are tried.
        note: why it is less than somebody asked for; ``""`` if it is not, or if trying has not come to an end.
        probe: ``passed``, ``not probed: ...``, ``depends on the batch: ...``, or ``""`` so far.
    """

    run: Run
    rows: ProbeRows
    tolerance: float
    rows_max: int | None = None
    is_allowed: bool = False
    look: Callable[[], str] = lambda: ""
    others: Sequence[ProbeRows] = ()
    size_max: int = 1
    note: str = ""
    probe: str = ""
    _has_looked: bool = False
    _shapes_tried: int = 0
    _tried: set[Step] = field(default_factory=set)
    _batch_probe: BatchProbe | None = None

    def __post_init__(self) -> None:
        self._batch_probe = BatchProbe(self.run, self.rows, self.tolerance)

    def is_settled_for(self, size: int) -> bool:
        """Whether nothing more can be found out about batches of up to ``size``."""
        return bool(self.note) or size <= self.size_max

    def extend(self, size: int, budget_s: float = math.inf) -> None:
        """Tries batches of up to ``size``, until ``budget_s`` seconds are over; the next call continues there. Any
        thread, one at a time."""  # fmt: skip
        if self.is_settled_for(size):
            return
        if not self._has_looked:
            self._has_looked = True
            problem = self.look()
            if problem and not self.is_allowed:
                self._limit_to_one(problem)
                return
        if self.rows_max is not None and size > self.rows_max:
            self._settle(min(size, self.rows_max), budget_s)
            if self.size_max == self.rows_max:
                self.note = f"the program takes batches of at most {self.rows_max}"
            return
        self._settle(size, budget_s)

    def _limit_to_one(self, problem: str) -> None:
        self.size_max = 1
        self.note = f"runs one item per batch: {problem}; {_ALLOW_FIX}"
        self.probe = f"depends on the batch: {problem}"

    def _settle(self, size: int, budget_s: float) -> None:
        if self.is_allowed:
            self.size_max, self.probe = size, "allowed to depend on the batch by batchDependent"
            return
        began = time.monotonic()
        self.probe = ""
        assert self._batch_probe is not None
        problem = self._try_shapes(size)
        if problem:
            self._limit_to_one(problem)
            return
        for step in steps(self._batch_probe.numbers, size):
            if step not in self._tried:
                if time.monotonic() - began >= budget_s:
                    return
                try:
                    problem = self._batch_probe.try_step(step)
                except Exception as error:  # the model's own code
                    problem = f"it cannot be tried: {cause_of(str(error))}"
                if problem:
                    self._limit_to_one(problem)
                    return
                self._tried.add(step)
            self.size_max = max(self.size_max, step.shown)
        self.probe = "passed"

    def _try_shapes(self, size: int) -> str:
        """Why items of another size depend on each other; those that the model does not take say nothing."""
        for made in self.others[self._shapes_tried :]:
            probe = BatchProbe(self.run, made, self.tolerance)
            shape = ", ".join("x".join(map(str, each.shape[1:])) for each in made.unlike[0])
            try:
                for count in (2, 3):
                    problem = probe.try_step(size_step(probe.numbers, count)) if count <= size else ""
                    if problem:
                        return f"of size {shape}, {problem}"
            except Exception as error:
                log.debug("batches of size %s cannot be tried: %s", shape, error)
            self._shapes_tried += 1
        return ""


def prove_optimization(
    model: Any, example: Sequence[torch.Tensor], domains: Sequence[InputDomain], *, plain: Run | None = None
) -> str:
    """Compares the optimised graph with the plain one, on what oneDNN's kernels are known to treat in another way.

    Args:
        model: a ``_core.TorchModel``.
        example: one item [1, ...] per input.
        plain: the plain graph, where it is there already; else the model reads it.

    Returns:
        the input on which they differ, for a person; ``""`` if there is none.
    """
    if not model.is_optimized:
        return ""
    largest = [each * ORDINARY_MAX if each.is_floating_point() else each for each in example]
    probes = [("numbers at the limit", largest)]
    probes += [(each.name, [part[:1] for part in each.inputs]) for each in probe_inputs(example, domains)]
    began = time.monotonic()
    for count, (name, inputs) in enumerate(probes):
        if count >= OPTIMIZATION_PROBES_MIN and time.monotonic() - began >= OPTIMIZATION_BUDGET_S:
            break  # what could hide NaN was looked for in the graph (csrc/finite_flow.cpp)
        expected = outcome(plain or model.run_plain, inputs)
        got = outcome(model.run, inputs)
        if not _agrees(expected, got, inputs):
            return name
    return ""


def _agrees(expected: Any, got: Any, inputs: Sequence[torch.Tensor]) -> bool:
    if isinstance(expected, type) or isinstance(got, type):
        return expected is got
    is_large = any(bool((each.abs() > _LARGE_MIN).any()) for each in inputs if each.is_floating_point())
    if is_large:
        return _finite(expected) == _finite(got)
    return difference(expected, got) <= ROUNDING["fp32"]


def _finite(output: Any) -> list[list[bool]]:
    """Of each tensor in ``output``, which of its numbers are finite."""
    if isinstance(output, torch.Tensor):
        return [torch.isfinite(output).flatten().tolist()]
    if isinstance(output, dict):
        return [part for each in output.values() for part in _finite(each)]
    if isinstance(output, (list, tuple)):
        return [part for each in output for part in _finite(each)]
    return []


def hides_overflow(truth: Run, candidate: Run, example: Sequence[torch.Tensor], domains: Sequence[InputDomain]) -> bool:
    """Whether ``candidate`` gives numbers where ``truth`` gives NaN or infinity, or the other way round, on numbers as
    large as the engine leaves to it. What overflows within a model may not show in its answer any more.
    """
    if not any(_takes_any(domain) for domain in domains):
        return False
    items = batch_rows(example, domains, ITEMS_MAX)
    for item, sign in ((items[0], 1), (items[2], 1), (items[4], -1)):  # all positive, of both signs, all negative
        inputs = [_enlarged(each, sign) if _takes_any(domain) else each
                  for each, domain in zip(item, domains, strict=True)]  # fmt: skip
        expected, got = outcome(truth, inputs), outcome(candidate, inputs)
        if isinstance(expected, type) or isinstance(got, type):
            if expected is not got:
                return True
        elif _finite(expected) != _finite(got):
            return True
    return False


def _takes_any(domain: InputDomain) -> bool:
    return domain.dtype.is_floating_point and domain.values is None


def _enlarged(numbers: torch.Tensor, sign: int) -> torch.Tensor:
    """``numbers`` whose largest is just below `ORDINARY_MAX`, above which the engine asks nothing of a candidate."""
    if not numbers.numel():
        return numbers
    limit = 0.99 * min(ORDINARY_MAX, torch.finfo(numbers.dtype).max)
    return numbers * (sign * limit / max(float(numbers.abs().max()), 1e-30))


def find_state(model: Any, example: Sequence[torch.Tensor], *, is_package: bool, unchanged: int | None = None) -> None:
    """Notes in ``model`` what only running it shows: that calls leave traces in it.

    The graph of TorchScript is searched when it is loaded (csrc/graph_state.cpp); this finds what operators write
    without saying so. A package has no graph to search: that it gives two answers to one question has to do.

    Args:
        unchanged: its checksum before it has run, where it has run since; else it is run here.
    """
    if model.state:
        return
    if unchanged is None:
        unchanged = model.checksum()
        outcome(model.run, example)
    if model.checksum() != unchanged:
        model.note_state("a call changes a weight or a constant of the model")
    elif is_package:
        first, second = outcome(model.run, example), outcome(model.run, example)
        if not isinstance(first, type) and difference(first, second) != 0:
            model.note_state("the package answers one question in two ways when it is asked twice")


def single_row_differs(model: Any, example: Sequence[torch.Tensor]) -> bool:
    """Whether a package gives an item alone another answer than twice in a batch: torch compiles a dynamic batch for
    two and more, and says nothing of one."""  # fmt: skip
    alone, pair = outcome(model.run, example), outcome(model.run, [torch.cat([each, each]) for each in example])
    return not difference(alone, pair if isinstance(pair, type) else rows(pair, 0, 1)) <= ROUNDING["fp32"]
