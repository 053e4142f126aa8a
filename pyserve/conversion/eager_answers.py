"""What an eager model answers: the truth that its conversion is compared with.

Every run begins with the model as it was loaded, whatever earlier runs did to its buffers and attributes, and with the
same state of torch's generator as the converted model's run. Of what a model changes where no attribute shows it, later
answers are others than its conversion's, which is refused.
"""

from __future__ import annotations

import contextlib
import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pyserve.conversion.mode_questions import mode_questions
from pyserve.conversion.record import NeedsPythonError
from pyserve.proof.comparison import difference
from pyserve.proof.traced_reads import ReadsWatch
from pyserve.torch_error import cause_of

# Not a number that a model would seed the generator with itself.
_SEED = 918_273_645

Inputs = Sequence[torch.Tensor]


class Refusal:
    """A run that raised.

    Attributes:
        cause: what, in one line.
    """

    def __init__(self, error: Exception):
        cause = cause_of(str(error))
        self.cause = f"{type(error).__name__}{': ' if cause else ''}{cause}"[:200]


class EagerAnswers:
    """Runs a model for its answers.

    Attributes:
        keeps_state: a run changes a buffer or an attribute, so that two runs in a row are compared.
        draws: a run draws random numbers of torch's.
        run_s: how long one run of the example took, seconds.
        questions: what its code asked about how it is being run.
    """

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self._can_be_copied = True
        self.keeps_state = self.draws = False
        self.run_s = 0.0
        self.questions: set[str] = set()
        self._kept: dict[int, list[Any] | Refusal] = {}
        self._unchanged: tuple[torch.nn.Module, dict[str, Any]] | None = None  # a copy that has run, as it was before

    def fresh(self) -> torch.nn.Module:
        """A copy with buffers and attributes of its own; parameters are shared. The model itself if it has no copy."""
        if self._can_be_copied:
            try:
                # detached from the original's memory by nothing but the parameters
                memo: dict[int, Any] = {id(each): each for each in self._model.parameters()}
                return copy.deepcopy(self._model, memo)
            except Exception:  # locks, generators, tensors that were computed: whatever the model file put there
                self._can_be_copied = False
        return self._model

    def without_gradients(self) -> torch.nn.Module | None:
        """As `fresh`, with parameters of the same memory that need no gradients; None if the model has no copy."""
        memo: dict[int, Any] = {
            id(each): torch.nn.Parameter(each.detach(), requires_grad=False)
            if type(each) is torch.nn.Parameter else each
            for each in self._model.parameters()
        }  # fmt: skip
        try:
            return copy.deepcopy(self._model, memo)
        except Exception:  # as in `fresh`
            return None

    def examine(self, example: Inputs) -> ReadsWatch:
        """Finds out whether the model keeps state, or draws random numbers elsewhere than from torch.

        Returns:
            What its code did with the example.

        Raises:
            NeedsPythonError: it cannot be shown that a conversion is true to it.
            Exception: whatever the model raises for the example.
        """
        model = self.fresh()
        parameters = [each._version for each in model.parameters()]
        before = _state(model)
        given = [each.clone() for each in example]
        with ReadsWatch(given) as watch, mode_questions() as self.questions:
            first = _run(model, given, 0, copies=False)
        self.draws = not torch.equal(torch.get_rng_state(), _state_of_seed(0))
        self.keeps_state = _state(model) != before
        if parameters != [each._version for each in model.parameters()]:
            raise NeedsPythonError("it changes its own parameters when it runs")
        with _other_random_numbers():
            started_at = time.perf_counter()
            again = _run(model, example, 0)
            self.run_s = time.perf_counter() - started_at
            if difference(first, again) != 0.0:
                self._explain(first, again, example)
        if self.keeps_state and not self._can_be_copied:
            raise NeedsPythonError("it changes its own state when it runs, and cannot be copied (copy.deepcopy)")
        self._unchanged = None if self.keeps_state else (model, before)
        return watch

    def _explain(self, first: Any, again: Any, example: Inputs) -> None:
        """Why two runs of one copy differ, of which only the first was watched.

        Where nobody watches, torch takes the fast path of its attention, which rounds otherwise and leaves out what is
        masked: then a copy that runs unwatched answers what the second run did.
        """
        if self._can_be_copied and difference(again, _run(self.fresh(), example, 0)) == 0.0:
            return
        self.keeps_state = True
        with ReadsWatch():
            watched = _run(self.fresh(), example, 0)
        if difference(first, watched) != 0.0:
            raise NeedsPythonError("two runs on one input differ: it draws random numbers elsewhere than from torch")

    def answers(self, number: int, inputs: Inputs) -> list[Any] | Refusal:
        """The outputs for probe ``number``, of a second run too if the model keeps state; or what it raised."""
        if number not in self._kept:
            self._kept[number] = runs(self._like_fresh, inputs, number, twice=self.keeps_state)
        return self._kept[number]

    def _like_fresh(self) -> torch.nn.Module:
        """A copy that has run and is as it was before, as far as can be seen; else a new one."""
        if self._unchanged is None or _state(self._unchanged[0]) != self._unchanged[1]:
            model = self.fresh()
            self._unchanged = None if self.keeps_state else (model, _state(model))
            return model
        return self._unchanged[0]


@contextlib.contextmanager
def _other_random_numbers() -> Iterator[None]:
    """Inside of it, Python and numpy draw others than outside."""
    states = np.random.get_state(), random.getstate()
    np.random.seed(_SEED)
    random.seed(_SEED)
    try:
        yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])


def runs(fresh: Callable[[], Callable[..., Any]], inputs: Inputs, number: int, *, twice: bool) -> list[Any] | Refusal:
    """Outputs of a model as ``fresh`` gives it, run on copies of ``inputs``."""
    try:
        model = fresh()
        return [_run(model, inputs, number) for _ in range(2 if twice else 1)]
    except Exception as error:  # the model's own code
        return Refusal(error)


def _state_of_seed(number: int) -> torch.Tensor:
    """Of torch's generator, as `_run` begins."""
    return torch.Generator().manual_seed(_SEED + number).get_state()


def _run(model: Callable[..., Any], inputs: Inputs, number: int, *, copies: bool = True) -> Any:
    torch.manual_seed(_SEED + number)
    return _detached(model(*((each.clone() for each in inputs) if copies else inputs)))


def _detached(output: Any) -> Any:
    """Tensors as they are now: a model may answer with a buffer that its next run writes to."""
    if isinstance(output, torch.Tensor):
        return output.detach().clone()
    if isinstance(output, dict):
        return {key: _detached(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        parts = [_detached(each) for each in output]
        if isinstance(output, list):
            return parts
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    return output


def _state(model: torch.nn.Module) -> dict[str, Any]:
    """What shows that a run changed something: versions of buffers, and attributes by identity and length."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_modules", "_parameters"):
                continue
            if key == "_buffers":
                state[f"{name}.{key}"] = [(k, id(b), b._version) for k, b in value.items() if b is not None]
            elif isinstance(value, (bool, int, float, str, type(None))):
                state[f"{name}.{key}"] = value
            elif isinstance(value, torch.Tensor):
                state[f"{name}.{key}"] = (id(value), value._version)
            else:
                state[f"{name}.{key}"] = (id(value), len(value) if isinstance(value, (list, dict, set)) else 0)
    return state
