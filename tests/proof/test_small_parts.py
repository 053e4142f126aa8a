"""Parts of answers that are small beside the rest, at full precision: where a fault hides, and what is rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from pyserve.backends.trial import probes_of
from pyserve.proof.agreement import agreement
from pyserve.proof.batch_probe import BatchProbe, steps
from pyserve.proof.moved_inputs import rounded
from pyserve.proof.probe_inputs import InputDomain, probe_inputs, probe_rows
from pyserve.proof.small_parts import SmallParts

Rows = Sequence[torch.Tensor]
EXAMPLE = [torch.tensor([[0.5, -1.0, 2.0, 0.25]])]
FOUR = [InputDomain(torch.float32, ((4, 4),))]


def detected(inputs: Rows, change: Callable[[torch.Tensor], torch.Tensor] = lambda scores: scores) -> torch.Tensor:
    """Coordinates around 640, and a score below 0.04. NaN or infinity anywhere is NaN everywhere."""
    x = inputs[0].tanh()
    seen = x.mean(1, keepdim=True) + 0 * inputs[0].sum(1, keepdim=True)
    return torch.cat([640 + 40 * x + 0 * seen, change(0.02 + 0.02 * seen)], 1)


def exactly(inputs: Rows) -> torch.Tensor:
    return detected([each.double() for each in inputs])


def wrong(inputs: Rows) -> torch.Tensor:
    return detected(inputs, lambda scores: scores * 0.9)


def test_probes_of_nan_and_infinities_do_not_outvote_the_others() -> None:
    probes = probes_of(EXAMPLE, FOUR, 2)[:6]
    answers = [detected(probe.inputs) for probe in probes]
    assert sum(not each.isfinite().any() for each in answers) == 2
    assert not agreement(detected, detected, probes, 1e-4, exact=exactly).objection
    found = agreement(detected, wrong, probes, 1e-4, exact=exactly)
    assert "(number 4 of dimension 1)" in found.objection, found


def test_a_fault_that_most_probes_do_not_reach_is_found() -> None:
    """An approximation that is wrong in the middle, where saturated and constant numbers do not come."""

    def in_the_middle(inputs: Rows) -> torch.Tensor:
        return detected(inputs, lambda scores: torch.where((scores - 0.022).abs() < 4e-3, scores + 2e-3, scores))

    probes = probe_inputs(EXAMPLE, FOUR)
    reached = [bool((in_the_middle(each.inputs) != detected(each.inputs)).any()) for each in probes]
    assert 3 <= sum(reached) <= len(reached) / 2
    assert "small beside the rest" in agreement(detected, in_the_middle, probes, 1e-4, exact=exactly).objection


def batches(run: Callable[[Rows], Any], largest: int) -> str:
    """Why answers depend on batches of up to ``largest``, or ``""``."""
    probe = BatchProbe(run, probe_rows(EXAMPLE, FOUR), 1e-4)
    return next((text for step in steps(probe.numbers, largest) if (text := probe.try_step(step))), "")


def last_row(scores: torch.Tensor) -> torch.Tensor:
    return torch.cat([scores[:-1], scores[-1:] * (0.9 if len(scores) > 1 else 1)])


def like_the_one_before(scores: torch.Tensor) -> torch.Tensor:
    """What nearly equals a score before it becomes nothing."""
    return scores * (1 - ((scores - scores.T).abs() < 1e-4).float().tril(-1).amax(1, keepdim=True))


@pytest.mark.parametrize(
    ("change", "largest"),
    [
        (last_row, 8),
        (lambda scores: scores * (0.6 if len(scores) > 8 else 1), 16),
        (lambda scores: scores * (0.6 if len(scores) == 7 else 1), 8),
        (like_the_one_before, 8),
    ],
)
def test_scores_that_one_place_or_one_size_changes_are_found(
    change: Callable[[torch.Tensor], torch.Tensor], largest: int
) -> None:
    assert "small beside the rest" in batches(lambda inputs: detected(inputs, change), largest)


def test_a_number_that_is_by_chance_rounded_to_what_it_was_is_no_fault() -> None:
    """What is left of one minus the sum of shares is a few roundings, or none."""
    weights = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))

    def run(inputs: Rows) -> torch.Tensor:
        shares = (inputs[0].nan_to_num(0.0, 0.0, 0.0) @ weights / 4).softmax(1)
        return torch.cat([shares, 1 - shares.flip(1).sum(1, keepdim=True)], 1)

    def noisy(inputs: Rows) -> torch.Tensor:
        """Additions in another order in larger batches."""
        rows = run(inputs)
        return torch.cat([rows[:, :-1], 1 - rows[:, :-1].sum(1, keepdim=True)], 1) if len(rows) > 1 else rows

    assert batches(noisy, 8) == ""


@pytest.mark.parametrize("number", [torch.tensor([[300.0, -7.0]]), torch.zeros(1, 2), torch.ones(1, 2).long()])
def test_answers_that_do_not_move_with_their_inputs_are_off_by_what_networks_are(number: torch.Tensor) -> None:
    def run(inputs: Rows) -> torch.Tensor:
        return 640 * (inputs[0].clamp(0, 1) + 1)

    answer = run([number])
    [off] = rounded(run, [number], [answer])
    if answer.is_floating_point():
        assert 1e-7 < float((off - answer).abs().max() / answer.max()) < 1e-5
    assert off.dtype == answer.dtype


def test_where_a_moved_input_is_refused_nothing_is_known_but_what_networks_are_off_by() -> None:
    answer = torch.tensor([[640.0, 0.5]])
    [off] = rounded(lambda inputs: None, [torch.ones(1, 2)], [answer])
    assert 0 < float((off - answer).abs().max()) < 1e-2


def test_tensors_without_places_are_left_out() -> None:
    parts = SmallParts(1e-4, probes_min=1)
    sparse = torch.eye(3).to_sparse()
    assert not parts.note(sparse, sparse, sparse)
    assert not parts.note(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3))
    assert parts.note([640.0, torch.tensor([[640.0, 1.0]])], [640.0, torch.tensor([[640.0, 1.0]])],
                      [640.0, torch.tensor([[640.0, 1.1]])])  # fmt: skip
