"""Two ways to run one network, compared; and whether one of them gives one answer to one question."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from pyserve.proof.agreement import Precisions, agreement
from pyserve.proof.probe_inputs import Probe
from pyserve.proof.repeats import why_composed, why_not_repeated

Rows = Sequence[torch.Tensor]
ITEMS = [(torch.arange(4.0).reshape(1, 4) + number,) for number in range(4)]
PROBES = [Probe("small numbers", ITEMS[0]), Probe("other numbers", ITEMS[1]), Probe("negative ones", (-ITEMS[2][0],))]


def double(inputs: Rows) -> Any:
    return inputs[0] * 2


def test_equal_answers_agree_on_every_probe() -> None:
    found = agreement(double, double, PROBES, 1e-4)
    assert (found.difference, found.probes, found.objection) == (0.0, len(PROBES), "")


def test_the_largest_difference_is_told_and_judged() -> None:
    def nearly(inputs: Rows) -> Any:
        return inputs[0] * (2 + 1e-5)

    found = agreement(double, nearly, PROBES, 1e-4)
    assert 1e-6 < found.difference < 1e-4 and not found.objection
    found = agreement(double, nearly, PROBES, 1e-7)
    assert found.objection.startswith("its answer differs by") and found.objection.endswith("on small numbers")
    assert found.probes == 1, "the first that differs settles it"


def at(factor: float) -> Callable[[Rows], Any]:
    return lambda inputs: inputs[0] * factor


@pytest.mark.parametrize(
    ("truth", "full", "lower", "agrees"),
    [
        (2.0, 2.0, 2.02, True),  # torch is off to the other side itself, and nearly as far
        (2.0, 2.0, 1.96, True),  # within the tolerance of what torch gives at that precision
        (2.0, 2.0, 2.2, True),  # torch itself is much farther from what is right
        (2.0, 2.0, 2.001, False),  # torch is near to what is right
        (1.86, 1.94, 1.86, True),  # within the tolerance of fp32, though not of torch at that precision
        (1.80, 2.08, 2.08, False),  # of neither
        (2.0, 2.0, math.nan, False),  # torch gives no number at that precision: nothing is known
    ],
)
def test_an_answer_at_a_lower_precision_is_judged_by_torch_at_both(
    truth: float, full: float, lower: float, agrees: bool
) -> None:
    """Of an input on which a network hangs by a hair each engine is off by some percent, and not to one side."""
    candidate, tolerance = 1.94, 0.02
    if lower == 2.02:
        candidate, tolerance = 1.976, 0.01
    found = agreement(at(truth), at(candidate), PROBES, tolerance, precisions=Precisions(at(full), at(lower)))
    assert (not found.objection) is agrees, found
    assert agreement(at(truth), at(candidate), PROBES, tolerance).objection


def test_what_one_tensor_hangs_on_says_nothing_about_another() -> None:
    """Torch is off by half in the first, and near in the second."""

    def both(first: float, second: float) -> Callable[[Rows], Any]:
        return lambda inputs: (inputs[0] * first, inputs[0] * second)

    precisions = Precisions(both(2.0, 2.0), both(3.0, 2.01))
    for second, agrees in ((2.015, True), (1.5, False)):
        found = agreement(both(3.0, 2.01), both(1.5, second), PROBES, 0.02, precisions=precisions)
        assert (not found.objection) is agrees, (second, found)


def boxes_and_scores(noise: float, seed: int, *, scores: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid) -> Any:
    """A network of corners in pixels and scores below one, whose numbers are each off by up to that share."""

    def run(inputs: Rows) -> Any:
        [x] = inputs
        generator = torch.Generator().manual_seed(seed + int(x.abs().sum() * 100))
        boxes, found = (400 + x[:, :, None] * 20).repeat(1, 1, 4), scores(x)[:, :, None]
        answer = torch.cat([boxes, found, 1 - found], 2)
        return answer * (1 + noise * (torch.rand(answer.shape, generator=generator) - 0.5))

    return run


def items(count: int, columns: int) -> list[Probe]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(1 + number % 3, columns, generator=generator) * 3 for number in range(count)]
    return [Probe(f"item {number}", (each,)) for number, each in enumerate(made)]


@pytest.mark.parametrize(
    ("scores", "agrees"),
    [
        (torch.sigmoid, True),
        (lambda x: x, False),  # a sigmoid is missing
        (torch.zeros_like, False),
        (lambda x: torch.sigmoid(x).flip(1), False),  # those of other boxes
    ],
)
def test_scores_that_are_wrong_beside_large_coordinates_are_seen(
    scores: Callable[[torch.Tensor], torch.Tensor], *, agrees: bool
) -> None:
    full, lower = boxes_and_scores(0.0, 0), boxes_and_scores(0.01, 1)
    candidate = boxes_and_scores(0.01, 2, scores=scores)
    for truth in (full, lower):
        found = agreement(truth, candidate, items(8, 5), 0.05, precisions=Precisions(full, lower))
        assert (not found.objection) is agrees, found
        assert found.difference < 0.05, "as counted beside the coordinates"


@pytest.mark.parametrize("off", [0.03, 5e-3, 1e-3])
@pytest.mark.parametrize("knows_exact", [False, True])
def test_scores_that_are_a_little_wrong_beside_large_coordinates_are_seen_at_full_precision(
    *, off: float, knows_exact: bool
) -> None:
    """Less than 1e-4 of the coordinates, and hundreds of times what rounding does to a score."""
    truth = boxes_and_scores(0.0, 0)
    exact = truth if knows_exact else None
    found = agreement(truth, boxes_and_scores(1e-7, 1), items(8, 5), 1e-4, exact=exact)
    assert not found.objection, found

    def wrong(inputs: Rows) -> Any:
        answer = truth(inputs)
        return torch.cat([answer[:, :, :4], answer[:, :, 4:] * (1 - off)], 2)

    found = agreement(truth, wrong, items(8, 5), 1e-4, exact=exact)
    assert "small beside the rest (number 4 of dimension 2)" in found.objection, found
    assert found.difference < 1e-4, "as counted beside the coordinates"


@pytest.mark.parametrize("columns", [1, 7, 300])
def test_what_rounding_leaves_in_small_parts_is_not_wrong(columns: int) -> None:
    """Differences of nearly equal sums: torch and the other engine are both off in them, each to its own side."""

    def truth(inputs: Rows) -> Any:
        [x] = inputs
        large = x.sum(1, keepdim=True) * 100
        return torch.cat([large, (large * (1 + 1e-5) - large).expand(-1, columns)], 1)

    def candidate(inputs: Rows) -> Any:
        return truth([inputs[0].flip(1)])

    probes = [Probe(f"item {seed}", (torch.randn(2, 50, generator=torch.Generator().manual_seed(seed)),))
              for seed in range(8)]  # fmt: skip
    for exact in (None, exactly(truth)):
        found = agreement(truth, candidate, probes, 1e-4, exact=exact)
        assert not found.objection, found


@pytest.mark.parametrize("columns", [3, 10, 1000])
@pytest.mark.parametrize("count", [3, 4, 12])
def test_roundings_of_one_size_are_no_wrong_part(columns: int, count: int) -> None:
    """Each of many numbers is by chance small, or nearly right in torch's answer."""

    def noisy(seed: int) -> Callable[[Rows], Any]:
        def run(inputs: Rows) -> Any:
            generator = torch.Generator().manual_seed(seed + int(inputs[0].abs().sum() * 100))
            return inputs[0] + torch.randn(inputs[0].shape, generator=generator) * 0.05

        return run

    def full(inputs: Rows) -> Any:
        return inputs[0]

    for seed in range(10):
        lower, candidate = noisy(2 * seed), noisy(2 * seed + 1)
        found = agreement(lower, candidate, items(count, columns), 0.1, precisions=Precisions(full, lower))
        assert not found.objection, found


def test_what_no_rounding_explains_is_not_explained_by_a_precision() -> None:
    def other_shape(inputs: Rows) -> Any:
        return inputs[0][:, :2]

    asked = []

    def at_any(inputs: Rows) -> Any:
        asked.append(1)
        return other_shape(inputs)

    found = agreement(double, other_shape, PROBES, 0.5, precisions=Precisions(at_any, at_any))
    assert found.objection and not asked


def test_what_one_refuses_the_other_has_to_refuse() -> None:
    def refuses(inputs: Rows) -> Any:
        if bool((inputs[0] < 0).any()):
            raise ValueError("no negative numbers")
        return inputs[0] * 2

    def refuses_in_other_words(inputs: Rows) -> Any:
        if bool((inputs[0] < 0).any()):
            raise IndexError
        return inputs[0] * 2

    assert agreement(refuses, refuses_in_other_words, PROBES, 1e-4).objection == ""
    assert agreement(refuses, double, PROBES, 1e-4) .objection == (
        "it answers negative ones, which the model refuses (no negative numbers)"
    )  # fmt: skip
    found = agreement(double, refuses, PROBES, 1e-4)
    assert found.objection == "it fails on negative ones: no negative numbers" and math.isinf(found.difference)


@pytest.mark.parametrize(
    "other",
    [
        lambda inputs: (inputs[0] * 2).double(),
        lambda inputs: [inputs[0] * 2],
        lambda inputs: {"scores": inputs[0] * 2},
        lambda inputs: (inputs[0] * 2)[:, :3],
        lambda inputs: torch.where(inputs[0] == 3, math.nan, inputs[0] * 2),
    ],
)
def test_structure_dtypes_shapes_and_nan_count(other: Callable[[Rows], Any]) -> None:
    assert agreement(double, other, PROBES, 1e9).objection


def test_inputs_are_given_as_they_were_whatever_a_call_writes_to_them() -> None:
    def in_place(inputs: Rows) -> Any:
        return inputs[0].mul_(2)

    before = [each.inputs[0].clone() for each in PROBES]
    assert agreement(in_place, double, PROBES, 0).objection == ""
    assert all(torch.equal(each.inputs[0], kept) for each, kept in zip(PROBES, before, strict=True))


def test_the_right_answers_are_computed_once() -> None:
    calls: list[int] = []

    def counted(inputs: Rows) -> Any:
        calls.append(1)
        return inputs[0] * 2

    expected: dict[int, Any] = {}
    agreement(counted, double, PROBES, 1e-4, expected=expected)
    agreement(counted, double, PROBES, 1e-4, expected=expected)
    assert len(calls) == len(PROBES)
    assert agreement(counted, double, PROBES, 1e-4, is_enough=lambda count: count >= 2).probes == 2


# --- one question, one answer -----------------------------------------------------------------------------------------


def test_what_answers_in_one_way_is_not_named() -> None:
    assert why_not_repeated(double, ITEMS) == why_composed(double, ITEMS) == ""


def test_random_numbers_are_named() -> None:
    def noisy(inputs: Rows) -> Any:
        return inputs[0] + torch.rand(inputs[0].shape)

    assert why_not_repeated(noisy, ITEMS).startswith("answers one question in two ways, apart by")


def test_a_counter_is_named_though_it_shows_late() -> None:
    calls = itertools.count()

    def third(inputs: Rows) -> Any:
        return inputs[0] + (next(calls) >= 3)

    assert "it draws random numbers, or keeps something" in why_not_repeated(third, ITEMS)


def test_one_that_fails_now_and_then_is_named() -> None:
    calls = itertools.count()

    def failing(inputs: Rows) -> Any:
        if next(calls) % 2:
            raise RuntimeError("busy")
        return inputs[0]

    assert why_not_repeated(failing, ITEMS) == "fails for an input that it also answers"


def test_the_order_of_additions_is_no_other_answer() -> None:
    calls = itertools.count()

    def rounded(inputs: Rows) -> Any:
        return inputs[0] * (1 + 1e-7 * (next(calls) % 2))

    assert why_not_repeated(rounded, ITEMS) == ""


@pytest.mark.parametrize(
    "looks",
    [
        lambda inputs: inputs[0] - inputs[0].mean(0, keepdim=True),
        lambda inputs: inputs[0] + inputs[0].cumsum(0).flip(0),
        lambda inputs: inputs[0] / inputs[0].abs().max(),
    ],
)
def test_what_looks_at_the_rest_of_a_batch_is_named(looks: Callable[[Rows], Any]) -> None:
    assert why_not_repeated(looks, ITEMS) == ""
    assert why_composed(looks, ITEMS).startswith("answers an item otherwise")


# --- where an answer is next to nothing -------------------------------------------------------------------------------


def noisy(inputs: Rows) -> Any:
    """A normalization as torch computes it: of numbers that are all alike rounding is left."""
    return torch.nn.functional.instance_norm(inputs[0])


def exactly(function: Callable[[Rows], Any]) -> Callable[[Rows], Any]:
    return lambda inputs: function([each.double() for each in inputs])


def rounded(function: Callable[[Rows], Any]) -> Callable[[Rows], Any]:
    return lambda inputs: exactly(function)(inputs).float()


NORMALIZED = [
    Probe("random numbers", (torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0)),)),
    Probe("constant numbers", (torch.full((3, 4, 6, 5), 37.7),)),
    Probe("zeros", (torch.zeros(3, 4, 6, 5),)),
]


def test_torchs_own_rounding_of_constant_numbers_is_not_held_against_others() -> None:
    left = noisy([NORMALIZED[1].inputs[0]]).abs().max()
    assert left > 1e-5, "torch leaves nothing any more: the test shows nothing"
    assert agreement(noisy, rounded(noisy), NORMALIZED, 1e-4).objection == ""


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: torch.where(x[:, :1] == 37.7, 0.05, torch.nn.functional.instance_norm(x)),
        lambda x: torch.nn.functional.group_norm(x, 1),
        lambda x: torch.nn.functional.instance_norm(x, eps=1e-3),
        lambda x: torch.nn.functional.instance_norm(x) + 1e-3 * (x == 0),
        lambda x: torch.nn.functional.instance_norm(x).masked_fill(x == 37.7, math.nan),
    ],
)
def test_wrong_answers_to_constant_numbers_are(wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for exact in (None, exactly(noisy)):
        assert agreement(noisy, lambda inputs: wrong(inputs[0]), NORMALIZED, 1e-4, exact=exact).objection


def bias_then_norm(inputs: Rows) -> Any:
    x = inputs[0] * 0.25 + torch.linspace(0.1, 0.7, 4).to(inputs[0])[:, None, None]
    return torch.nn.functional.instance_norm(x)


def test_what_is_nothing_beside_ordinary_answers_is_judged_by_what_is_exact() -> None:
    """Behind a bias zeros are numbers that are all alike, though no step moves them."""
    left = bias_then_norm(NORMALIZED[2].inputs)
    assert 1e-7 < left.abs().max() < 1e-4

    def otherwise(inputs: Rows) -> Any:
        found = bias_then_norm(inputs)
        return found * 7 if inputs[0].abs().max() == 0 else found

    zeros = [NORMALIZED[0], NORMALIZED[2]]
    assert agreement(bias_then_norm, otherwise, zeros, 1e-4).objection, "without what is exact nothing is known"
    assert agreement(bias_then_norm, otherwise, zeros, 1e-4, exact=exactly(bias_then_norm)).objection == ""

    def far(inputs: Rows) -> Any:
        return bias_then_norm(inputs) + 1e-2 * (inputs[0] == 0)

    assert agreement(bias_then_norm, far, zeros, 1e-4, exact=exactly(bias_then_norm)).objection


@pytest.mark.parametrize(
    ("truth", "candidate", "x"),
    [
        (double, lambda inputs: torch.where(inputs[0].abs() < 1e-5, 0.0, inputs[0] * 2), torch.full((1, 4), 1e-6)),
        (double, lambda inputs: inputs[0] * 2 + 1e-7, torch.full((1, 4), 1e-9)),
        (lambda inputs: torch.nn.functional.normalize(inputs[0]), lambda inputs: inputs[0] + 0.5, torch.zeros(1, 4)),
        (lambda inputs: inputs[0].floor(), lambda inputs: inputs[0].floor() - 1, torch.full((1, 4), 2.5)),
        (lambda inputs: inputs[0].sum(1), lambda inputs: inputs[0].sum(1) * 1.001, torch.full((1, 4), 3.7)),
    ],
    ids=["flushed to zero", "off by nothing", "of zeros", "steps", "sums"],
)
def test_answers_that_are_small_have_to_be_right_too(truth: Any, candidate: Any, x: torch.Tensor) -> None:
    probes = [Probe("random numbers", (torch.rand(3, 4) + 1,)), Probe("others", (x,))]

    def fine_at_first(inputs: Rows) -> Any:
        return truth(inputs) if len(inputs[0]) == 3 else candidate(inputs)

    for exact in (None, exactly(truth)):
        assert agreement(truth, fine_at_first, probes, 1e-4, exact=exact).objection


def test_a_model_that_does_not_run_in_double_precision_explains_nothing() -> None:
    def refuses(inputs: Rows) -> Any:
        raise RuntimeError("expected Float, got Double")

    assert agreement(double, at(2.1), PROBES, 1e-4, exact=refuses).objection


def test_a_tensor_that_hangs_on_rounding_excuses_no_other() -> None:
    def both(function: Callable[[Rows], Any], factor: float) -> Callable[[Rows], Any]:
        return lambda inputs: (function(inputs), inputs[0].sum(1) * factor)

    for exact in (None, exactly(both(noisy, 1.0))):
        assert agreement(both(noisy, 1.0), both(rounded(noisy), 1.0), NORMALIZED, 1e-4, exact=exact).objection == ""
        assert agreement(both(noisy, 1.0), both(rounded(noisy), 1.001), NORMALIZED[1:], 1e-4, exact=exact).objection
