"""How many items of a model may share a batch: what may depend on the batch is found, what does not is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pyserve.proof.batch_probe import BatchProbe, Run, probe_sizes, steps
from pyserve.proof.native_proof import BatchProof
from pyserve.proof.probe_inputs import InputDomain, ProbeRows, other_examples, probe_rows

ITEM = [torch.tensor([[0.5, -1.0, 2.0, 0.25]])]
FOUR = InputDomain(torch.float32, ((4, 4),))


def probe_batches(run: Run, rows: ProbeRows, largest: int, tolerance: float) -> str:
    """Why answers depend on batches of up to ``largest``, or ``""``."""
    probe = BatchProbe(run, rows, tolerance)
    return next((text for step in steps(probe.numbers, largest) if (text := probe.try_step(step))), "")


def made(domain: InputDomain = FOUR) -> ProbeRows:
    return probe_rows(ITEM, [domain])


def beside_coordinates(inputs: Any, *, of_batch: bool) -> torch.Tensor:
    """A score below 0.05 beside 640 to 680: whatever it is, the difference of the tensor is below 1e-4."""
    x = inputs[0].nan_to_num(0.0, 0.0, 0.0).tanh()
    seen = x.mean(0, keepdim=True).expand_as(x) if of_batch else x
    return torch.cat([640 + 40 * x, (0.02 + 0.02 * seen).mean(1, keepdim=True)], 1)


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("softmax over the batch", lambda inputs: inputs[0].softmax(0)),
        ("statistics of the batch", lambda inputs: inputs[0] - inputs[0].mean(0)),
        ("one scale for all", lambda inputs: (inputs[0] / inputs[0].abs().max() * 127).round()),
        ("as many rows as in the export", lambda inputs: inputs[0][:1]),
        ("the batch's size", lambda inputs: (inputs[0], len(inputs[0]))),
        ("sorted", lambda inputs: inputs[0].sort(0).values),
        ("the largest of all", lambda inputs: {"at": inputs[0].argmax(0).expand(len(inputs[0]), 4)}),
        ("time for batch", lambda inputs: inputs[0].cumsum(0)),
        ("scores by the batch, beside coordinates", lambda inputs: beside_coordinates(inputs, of_batch=True)),
    ],
)
def test_answers_that_depend_on_the_batch_are_found(name: str, run: Any) -> None:
    assert probe_batches(run, made(), 8, 1e-4), name


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("softmax over the item", lambda inputs: inputs[0].softmax(1)),
        ("statistics of the item", lambda inputs: inputs[0] - inputs[0].mean(1, keepdim=True)),
        ("nested", lambda inputs: {"a": (inputs[0], None), "b": inputs[0].argmax(1)}),
        ("nan", lambda inputs: inputs[0].sqrt()),
        ("scores beside coordinates", lambda inputs: beside_coordinates(inputs, of_batch=False)),
    ],
)
def test_answers_of_their_own_are_left_alone(name: str, run: Any) -> None:
    assert probe_batches(run, made(), 8, 1e-4) == "", name


def test_sizes_to_try_are_all_small_ones_then_doubled_ones_and_the_largest() -> None:
    assert [probe_sizes(size) for size in (0, 1, 2, 3, 8)] == [[], [], [2], [2, 3], [2, 3, 4, 5, 6, 7, 8]]
    assert [probe_sizes(size)[7:] for size in (9, 16, 40, 64)] == [[9], [16], [16, 32, 40], [16, 32, 64]]


def no_room(inputs: Any) -> Any:
    """Three items find room in the group of their largest number; a fourth one is left as it is."""
    chosen = F.one_hot(inputs[0].nan_to_num().argmax(1), 4)
    place = (chosen.cumsum(0) * chosen).amax(1)
    return torch.where((place <= 3)[:, None], inputs[0] * 2, inputs[0])


def no_copies(inputs: Any) -> Any:
    """What resembles an item before it is left out."""
    directions = F.normalize(inputs[0].nan_to_num(0, 1, -1))
    return inputs[0].masked_fill((directions @ directions.T).tril(-1).gt(0.9999).any(1, keepdim=True), 0)


@pytest.mark.parametrize(
    ("name", "run", "words"),
    [
        ("NaN in any", lambda inputs: torch.where(inputs[0].isnan().any(), 0, inputs[0]), "of 4 with NaN"),
        ("infinity in any", lambda inputs: torch.where(inputs[0].isinf().any(), 0, inputs[0]), "of 4 with NaN"),
        ("zero times NaN", lambda inputs: torch.eye(len(inputs[0])) @ inputs[0], "of 4 with NaN"),
        ("NaN made finite", lambda inputs: inputs[0].nan_to_num(float(inputs[0].nanmean())), "of "),
        ("full groups", no_room, "of "),
        ("copies", no_copies, "of "),
        ("sizes between", lambda inputs: inputs[0] + (4 <= len(inputs[0]) < 8), "of 4 "),
        ("seven", lambda inputs: inputs[0] + (len(inputs[0]) == 7), "of 7 "),
    ],
)
def test_what_unlike_items_of_one_size_do_not_show_is_found(name: str, run: Any, words: str) -> None:
    proof = BatchProof(run, made(), 1e-4)
    proof.extend(8)
    assert proof.size_max == 1
    assert f"the answer of an item in a batch {words}" in proof.probe, name


@pytest.mark.parametrize(("run", "size"), [(no_room, 8), (no_copies, 2)])
def test_places_and_copies_show_only_between_like_items(run: Any, size: int) -> None:
    rows = made()
    unlike = ProbeRows([item for item in rows.unlike if item[0].any()][:5], [], [])
    assert probe_batches(run, unlike, 5, 1e-4) == ""
    assert "differs by" in probe_batches(run, ProbeRows(unlike.unlike, [], rows.alike), size, 1e-4)


def test_groups_that_are_full_above_eight_are_found_at_the_size_that_fills_them() -> None:
    def run(inputs: Any) -> Any:
        near = (inputs[0][:, None] - inputs[0][None]).abs().amax(2) < 0.1
        return inputs[0] * (near.tril(-1).sum(1, keepdim=True) < 12)

    rows = ProbeRows(made().unlike, [], made().alike)
    assert probe_batches(run, rows, 8, 1e-4) == ""
    assert "of 32 differs" in probe_batches(run, rows, 64, 1e-4)


def test_numbers_are_finite_where_their_range_is_known() -> None:
    known = made(InputDomain(torch.float32, ((4, 4),), (0, 1)))
    assert not known.not_finite
    proof = BatchProof(lambda inputs: torch.where(inputs[0].isnan().any(), 0, inputs[0]), known, 1e-4)
    proof.extend(8)
    assert (proof.size_max, proof.probe) == (8, "passed")


def test_a_model_that_fails_for_nan_and_infinities_is_tried_without_them() -> None:
    def run(inputs: Any) -> Any:
        if not inputs[0].isfinite().all():
            raise IndexError("index out of range in self")
        return inputs[0]

    proof = BatchProof(run, made(), 1e-4)
    proof.extend(8)
    assert (proof.size_max, proof.probe) == (8, "passed")


def batches_of(tried: list[int]) -> list[int]:
    return [size for size in tried if size > 1]


def test_batches_grow_only_as_far_as_they_were_tried() -> None:
    tried = []

    def run(inputs: Any) -> Any:
        tried.append(len(inputs[0]))
        return inputs[0] * 2

    proof = BatchProof(run, made(), 1e-4)
    assert proof.size_max == 1
    proof.extend(4, budget_s=0)
    assert proof.size_max == 1
    assert not proof.is_settled_for(4)
    proof.extend(4)
    assert proof.size_max == 4
    assert proof.probe == "passed"
    assert batches_of(tried) == [2, 4, 4, 3, 4]  # a pair, NaN, like items, and the other sizes
    proof.extend(3)
    proof.extend(16)
    assert proof.size_max == 16
    assert batches_of(tried)[5:] == [8, 5, 6, 7, 8, 16]
    assert tried.count(1) == 13  # each item alone once


def test_a_batch_that_took_too_long_is_where_the_next_call_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    now, tried = [0.0], []
    monkeypatch.setattr("pyserve.proof.native_proof.time.monotonic", lambda: now[0])

    def run(inputs: Any) -> Any:
        tried.append(len(inputs[0]))
        now[0] += 1.0 if len(inputs[0]) > 1 else 0.0
        return inputs[0]

    proof = BatchProof(run, made(), 1e-4)
    reached = []
    while not proof.is_settled_for(16):
        assert not proof.probe
        proof.extend(16, budget_s=2.0)  # two batches
        reached.append(proof.size_max)
    assert batches_of(tried) == [2, 4, 8, 3, 4, 5, 6, 7, 8, 16]
    assert reached == [1, 3, 5, 7, 16]


def test_a_program_is_never_given_more_rows_than_it_was_compiled_for() -> None:
    proof = BatchProof(lambda inputs: inputs[0], made(), 1e-4, rows_max=4)
    proof.extend(64)
    assert proof.size_max == 4
    assert proof.note == "the program takes batches of at most 4"
    assert proof.is_settled_for(64)


def test_what_depends_on_the_batch_runs_alone_and_says_how_to_allow_it() -> None:
    proof = BatchProof(lambda inputs: inputs[0].softmax(0), made(), 1e-4)
    proof.extend(8)
    assert proof.size_max == 1
    assert "batchDependent: allowed" in proof.note
    assert proof.probe.startswith("depends on the batch: the answer of an item in a batch of 2 differs by ")
    allowed = BatchProof(lambda inputs: inputs[0].softmax(0), made(), 1e-4, is_allowed=True)
    allowed.extend(8)
    assert (allowed.size_max, allowed.note) == (8, "")


def test_code_that_looks_at_a_whole_batch_runs_alone_whenever_larger_batches_are_asked_for() -> None:
    proof = BatchProof(lambda inputs: inputs[0], made(), 1e-4, look=lambda: "it looks at numbers (aten::Bool)")
    proof.extend(1)
    assert proof.note == ""
    proof.extend(8)
    assert proof.size_max == 1
    assert "it looks at numbers (aten::Bool); write 'batchDependent: allowed'" in proof.note


def test_a_batch_that_fails_where_its_items_do_not_runs_alone() -> None:
    def run(inputs: Any) -> Any:
        if len(inputs[0]) > 2:
            raise RuntimeError("The size of tensor a (3) must match the size of tensor b (2)")
        return inputs[0]

    proof = BatchProof(run, made(), 1e-4)
    proof.extend(8)
    assert proof.size_max == 1
    assert "a batch of 4 fails where each of its items alone does not: The size of tensor a (3)" in proof.note


STEPS = InputDomain(torch.float32, ((1, 400), (4, 4)))


def test_batches_are_tried_at_other_sizes_than_the_examples() -> None:
    example = [torch.rand(1, 16, 4)]

    def run(inputs: Any) -> Any:
        x = inputs[0]
        return x - x.mean(0) if x.shape[1] > 64 else x

    others = [probe_rows(each, [STEPS]) for each in other_examples(example, [STEPS], 2)]
    assert [each.unlike[0][0].shape[1] for each in others] == [400, 65]
    proof = BatchProof(run, probe_rows(example, [STEPS]), 1e-4, others=others)
    proof.extend(8)
    assert proof.size_max == 1
    assert "of size 400x4, the answer of an item in a batch of 2 differs" in proof.note
    right = BatchProof(lambda inputs: inputs[0] * 2, probe_rows(example, [STEPS]), 1e-4, others=others)
    right.extend(8)
    assert right.size_max == 8


def test_whole_numbers_are_never_nothing_but_padding() -> None:
    ids = InputDomain(torch.int64, ((8, 8),), (0, 99))
    masks = InputDomain(torch.bool, ((8, 8),))
    rows = probe_rows([torch.ones(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.bool)], [ids, masks])
    assert all(item[0].any() for item in rows.items)
    assert not all(item[1].all() for item in rows.items)
