"""Backends compared, measured and chosen: with models that are no models, on a clock of the test's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyserve.backends.trial import NOISE, ROUNDS_MIN, STANDING, Tried, choose, probes_of, try_backends
from pyserve.proof.probe_inputs import InputDomain

EXAMPLE = [torch.arange(4.0).reshape(1, 4)]
DOMAINS = [InputDomain(torch.float32, ((4, 4),))]


class Clock:
    """Seconds that pass only when a model runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeModel:
    """Doubles numbers, in ``seconds`` for each item and ``call_s`` for each call."""

    def __init__(
        self, clock: Clock, seconds: float, call_s: float = 0.0,
        answer: Callable[[torch.Tensor], Any] = lambda given: given * 2,
    ):  # fmt: skip
        self.sizes: list[int] = []
        self._clock, self._seconds, self._call_s, self._answer = clock, seconds, call_s, answer

    def run(self, inputs: list[torch.Tensor]) -> Any:
        self.sizes.append(inputs[0].shape[0])
        self._clock.now += self._call_s + self._seconds * inputs[0].shape[0]
        return self._answer(inputs[0])


def tried(clock: Clock, batch_size: int = 8, limit_s: float = 20.0, **models: FakeModel) -> dict[str, Tried]:
    found = try_backends(
        models, models[STANDING], EXAMPLE, DOMAINS, batch_size=batch_size, limit_s=limit_s, clock=clock
    )
    assert [each.backend for each in found] == list(models)
    return {each.backend: each for each in found}


def test_the_quickest_that_agrees_is_chosen() -> None:
    clock = Clock()
    found = tried(
        clock,
        torchscript=FakeModel(clock, 0.02),
        aotinductor=FakeModel(clock, 0.015),
        openvino=FakeModel(clock, 0.01),
    )
    assert found["openvino"].batch_1_ms == pytest.approx(10) and found["openvino"].batch_max_ms == pytest.approx(80)
    assert found["torchscript"].batch_max == 8
    assert found["openvino"].probes == len(probes_of(EXAMPLE, DOMAINS, 8))
    name, reason = choose(list(found.values()))
    assert name == "openvino"
    assert reason == "10 ms for one item, 80 ms for 8; torchscript: 20 ms for one item, 160 ms for 8"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda given: given * 2.001, "differs by"),
        (lambda given: (given * 2).round().long(), "other dtypes"),
        (lambda given: (given * 2)[:1], "in shape"),
        (lambda given: torch.nan_to_num(given) * 2, "NaN"),
        (lambda given: (given * 2,), "in shape"),
        (lambda given: given * 2 if given.shape[0] < 5 else given.flip(0) * 2, "a batch of 8"),
        (lambda given: given * 2 if given.shape[0] < 5 else given.nonexistent, "fails on a batch of 8"),
    ],
)
def test_one_that_answers_otherwise_is_refused(answer: Callable[[torch.Tensor], Any], said: str) -> None:
    clock = Clock()
    found = tried(clock, torchscript=FakeModel(clock, 0.02), openvino=FakeModel(clock, 0.001, answer=answer))
    assert said in found["openvino"].refused
    assert math.isinf(found["openvino"].batch_1_ms), "what is wrong is not measured"
    name, reason = choose(list(found.values()))
    assert name == STANDING and "openvino is left out: " in reason and said in reason


def test_what_the_model_refuses_has_to_be_refused() -> None:
    clock = Clock()

    def strict(given: torch.Tensor) -> torch.Tensor:
        if bool((given < 0).any()):
            raise IndexError("index out of range in self")
        return given * 2

    models = {"torchscript": FakeModel(clock, 0.02, answer=strict), "openvino": FakeModel(clock, 0.001)}
    found = tried(clock, **models)
    assert "which the model refuses (index out of range in self)" in found["openvino"].refused


def test_large_numbers_may_differ_as_far_as_rounding_explains() -> None:
    """sin(1e4 x) is moved by a step of rounding as far as two right ways to compute it are apart."""
    clock = Clock()

    def waves(given: torch.Tensor) -> torch.Tensor:
        return torch.sin(given.float())

    def other_waves(given: torch.Tensor) -> torch.Tensor:
        return torch.sin(given * (1 + 2.0**-23))

    def wrong(given: torch.Tensor) -> torch.Tensor:
        return torch.where(given.abs() > 1e3, torch.zeros_like(given), torch.sin(given))

    found = tried(
        clock,
        torchscript=FakeModel(clock, 0.02, answer=waves),
        right=FakeModel(clock, 0.01, answer=other_waves),
        wrong=FakeModel(clock, 0.01, answer=wrong),
    )
    assert not found["right"].refused
    assert found["wrong"].refused


def test_runs_take_turns_and_begin_with_each() -> None:
    clock = Clock()
    begun: list[str] = []

    class Noted(FakeModel):
        def __init__(self, name: str):
            super().__init__(clock, 0.01)
            self._name = name

        def run(self, inputs: list[torch.Tensor]) -> Any:
            begun.append(self._name)
            return super().run(inputs)

    names = ["torchscript", "aotinductor", "openvino"]
    models = {name: Noted(name) for name in names}
    try_backends(models, Noted("truth"), EXAMPLE, DOMAINS, batch_size=1, limit_s=1e9, clock=clock)
    rounds = [begun[-place - 3 : len(begun) - place] for place in range(0, 9, 3)]
    assert all(sorted(each) == sorted(names) for each in rounds)
    assert {each[0] for each in rounds} == set(names), "none always comes first"


def test_time_is_kept_and_what_it_did_not_suffice_for_is_refused() -> None:
    clock = Clock()
    found = tried(clock, limit_s=3.0, torchscript=FakeModel(clock, 1.0), openvino=FakeModel(clock, 0.5))
    assert clock.now <= 60  # a few probes are compared in any case
    assert "backendTrialSeconds" in found["openvino"].refused
    assert choose(list(found.values()))[0] == STANDING


def test_no_time_is_no_trial() -> None:
    clock = Clock()
    models = {"torchscript": FakeModel(clock, 0.01), "openvino": FakeModel(clock, 0.001)}
    found = tried(clock, limit_s=0, **models)
    assert choose(list(found.values()))[0] == STANDING
    assert not any(model.sizes for model in models.values())


def test_a_batch_is_measured_that_leaves_time_for_all() -> None:
    clock = Clock()
    models = {"torchscript": FakeModel(clock, 0.1), "openvino": FakeModel(clock, 0.05)}
    found = tried(clock, batch_size=2, limit_s=1000, **models)
    assert found["openvino"].batch_max == 2
    found = tried(clock, batch_size=512, limit_s=100, **models)
    assert 1 < found["openvino"].batch_max < 512
    assert choose(list(found.values()))[0] == "openvino"


def test_one_that_is_slower_for_long_items_is_not_chosen() -> None:
    """Kernels that are quick for few numbers may be slow for many."""

    class PerNumber(FakeModel):
        def run(self, inputs: list[torch.Tensor]) -> Any:
            self._seconds = self._own * inputs[0].shape[1]
            return super().run(inputs)

        def __init__(self, clock: Clock, seconds: float, call_s: float):
            super().__init__(clock, seconds, call_s)
            self._own = seconds

    def chosen(call_s: float, seconds: float) -> str:
        clock = Clock()
        models = {
            "torchscript": PerNumber(clock, 0.0001, call_s=0.01), "openvino": PerNumber(clock, seconds, call_s=call_s)
        }  # fmt: skip
        domains = [InputDomain(torch.float32, ((1, 512),))]
        found = try_backends(
            models, models[STANDING], EXAMPLE, domains, batch_size=8, limit_s=1e9, clock=clock
        )  # fmt: skip
        name, reason = choose(found)
        assert "for one of the largest size" in reason
        assert found[0].largest_ms == pytest.approx(10 + 0.1 * 512)
        return name

    assert chosen(call_s=0.001, seconds=0.00014) == STANDING
    assert chosen(call_s=0.001, seconds=0.0001) == "openvino"


def test_it_ends_when_nobody_wants_to_know_any_more() -> None:
    clock = Clock()
    models = {"torchscript": FakeModel(clock, 0.1), "openvino": FakeModel(clock, 0.05)}
    found = try_backends(
        models,
        models[STANDING],
        EXAMPLE,
        DOMAINS,
        batch_size=8,
        limit_s=20.0,
        clock=clock,
        is_over=lambda: len(models["openvino"].sizes) > 1,
    )
    assert len(models["openvino"].sizes) == 2
    assert choose(found)[0] == STANDING


def test_one_that_fails_while_it_is_measured_is_refused() -> None:
    clock = Clock()
    calls: list[int] = []

    def tiring(given: torch.Tensor) -> torch.Tensor:
        calls.append(given.shape[0])
        if len(calls) > 20:
            raise RuntimeError("out of something")
        return given * 2

    found = tried(clock, torchscript=FakeModel(clock, 0.02), openvino=FakeModel(clock, 0.001, answer=tiring))
    assert "out of something" in found["openvino"].refused
    assert choose(list(found.values()))[0] == STANDING


# --- choosing ---------------------------------------------------------------------------------------------------------


def row(backend: str, one: float, largest: float, refused: str = "") -> Tried:
    return Tried(backend, one, largest, 8, refused=refused)


@pytest.mark.parametrize(
    ("candidate", "chosen"),
    [
        ((10 * (1 - NOISE) - 0.1, 80 * (1 - NOISE) - 1), "openvino"),
        ((10 * (1 - NOISE) + 0.1, 80 * (1 - NOISE) + 1), STANDING),  # within noise
        ((5, 80 * (1 + NOISE) + 1), STANDING),  # slower at one size
        ((10 * (1 + NOISE) + 0.1, 20), STANDING),
        ((5, 80 * (1 + NOISE) - 1), "openvino"),
        ((math.inf, 20), STANDING),
    ],
)
def test_what_is_chosen_is_quicker_by_more_than_noise_and_slower_at_no_size(
    candidate: tuple[float, float], chosen: str
) -> None:
    assert choose([row(STANDING, 10, 80), row("openvino", *candidate)])[0] == chosen


def test_reasons_name_everything_that_was_tried() -> None:
    name, reason = choose(
        [row(STANDING, 10, 80), row("aotinductor", 10, 79), row("openvino", math.inf, math.inf, "it is not installed")]
    )
    assert name == STANDING
    assert reason == (
        "aotinductor is not quicker by more than 5%; torchscript: 10 ms for one item, 80 ms for 8; "
        "aotinductor: 10 ms for one item, 79 ms for 8; openvino is left out: it is not installed"
    )
    _, reason = choose([row("openvino", 10, 80), row("aotinductor", 10, 80), row(STANDING, 20, 90)], "openvino")
    assert reason.startswith("none is quicker by more than 5%; openvino: 10 ms for one item")
    assert choose([row("openvino", 5, 40), row("aotinductor", 4, 30)], "openvino") == (
        "aotinductor", "4 ms for one item, 30 ms for 8; openvino: 5 ms for one item, 40 ms for 8",
    )  # fmt: skip
    assert choose([row(STANDING, 10, 80)]) == (STANDING, "there is nothing else to run it on")
    assert choose([]) == (STANDING, "torchscript was not measured")


@pytest.mark.parametrize("times", [0, 1, ROUNDS_MIN])
def test_fewer_runs_than_are_believed_count_for_nothing(times: int) -> None:
    from pyserve.backends.trial import _summed_up, _Times

    summed = _summed_up("openvino", _Times({1: [1.0] * times, 8: [1.0] * 20}), 8, (1, 8))
    assert summed.refused and math.isinf(summed.batch_1_ms)
