"""Scores that depend on the batch are found beside coordinates, next to which any score is nothing; what is rounding,
drawn at random or measured is not suspected.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyserve.worker.batch_trial import Verdict
from pyserve.worker.trial_parts import differ_in_parts, tensors_in
from tests.support.tried_handlers import Try, attempt

__all__ = ["attempt"]

OWN = """
    import random, time
    import torch

    calls = []

    def handle(data, context):
        if data is None:
            return
        calls.append(len(data))
        x = torch.tensor([row["body"] for row in data], dtype=torch.float32)
        boxes = 640 + x.tanh().repeat(1, 2)
        scores = {scores}
        return {result}
"""
SAMPLES = {"sample_input1.json": "[1, 2]", "sample_input2.json": "[5, -3]"}
LISTS = "torch.cat([boxes, scores[:, None]], 1).tolist()"
OF_ITS_OWN = "0.02 + 0.01 * x[:, 0].sigmoid()"
OF_ALL = "0.02 + 0.01 * x[:, 0].softmax(0)"
DIFFER = "not probed: its answers to the same request differ from call to call"


def own(attempt: Try, scores: str, result: str = LISTS) -> Verdict:
    files = {"handler.py": OWN.format(scores=scores, result=result), **SAMPLES}
    return attempt("handler.py", files, config={}, batch_size=8).verdict


@pytest.mark.parametrize(
    "result",
    [
        LISTS,
        "[{'detections': [each, each]} for each in torch.cat([boxes, scores[:, None]], 1).tolist()]",
        "[{'x': x, 'y': y, 'score': score} for (x, y, *_), score in zip(boxes.tolist(), scores.tolist())]",
        "[f'{box[0]:.3f} {score:.5f}' for box, score in zip(boxes.tolist(), scores.tolist())]",
        "list(torch.cat([boxes, scores[:, None]], 1).unbind())",
    ],
)
@pytest.mark.parametrize("scores", [OF_ALL, "0.02 + 0.01 * x[:, 0].tanh().mean().expand(len(x))"])
def test_scores_by_the_batch_beside_coordinates_are_found(attempt: Try, scores: str, result: str) -> None:
    verdict = own(attempt, scores, result)
    assert "small beside the rest" in verdict.probe
    assert verdict.note


@pytest.mark.parametrize(
    ("scores", "result", "probe"),
    [
        (OF_ITS_OWN, LISTS, "passed"),
        (OF_ITS_OWN, "[[round(each, 2) for each in row] for row in torch.cat([boxes, scores[:, None]], 1).tolist()]",
         "passed"),
        ("torch.rand(len(x)) / 100", LISTS, DIFFER),
        ("random.SystemRandom().random() * 0.01 * torch.ones(len(x))", LISTS, DIFFER),
        ("torch.full((len(x),), len(calls) * 1e-3)", LISTS, DIFFER),
        # What looks alike at first and changes later: an item beside copies of itself is answered in two ways, too.
        ("torch.full((len(x),), max(len(calls), 4) * 1e-3)", LISTS, "passed"),
        # Differences of nearly equal sums, summed in another order.
        ("(x * 1e4).sum(1) * 0.1 + (len(x) > 1) * 1e-2", "torch.cat([boxes + (len(x) > 1) * 1e-2, scores[:, None]], 1)"
         ".tolist()", "passed"),
    ],
)  # fmt: skip
def test_scores_of_their_own_are_not_suspected(attempt: Try, scores: str, result: str, probe: str) -> None:
    assert own(attempt, scores, result) == Verdict(probe=probe)


def beside_coordinates(score: str) -> str:
    return f"torch.cat([640 + x.nan_to_num(0, 0, 0).tanh(), 0.02 + 0.02 * {score}], 1)"


@pytest.mark.parametrize(
    ("score", "is_found"),
    [
        ("x.nan_to_num(0, 0, 0).tanh().mean((0, 1)).expand(len(x), 1)", True),
        ("x.nan_to_num(0, 0, 0).tanh().mean(1, keepdim=True)", False),
        ("x[:, :1].to(torch.bfloat16).tanh().float().nan_to_num(0, 0, 0)", False),
    ],
)
def test_scores_of_a_built_in_handler_are_looked_at_too(attempt: Try, score: str, *, is_found: bool) -> None:
    verdict = attempt(result=beside_coordinates(score), batch_size=8).verdict
    assert bool(verdict.note) is is_found, verdict


def test_numbers_are_grouped_as_they_are_compared() -> None:
    answer: Any = [200, {"boxes": [[1.0, 2.0], [3.0, 4.0]], "label": "cat", "score": 0.5}, torch.ones(3)]
    assert [tuple(each.shape) for each in tensors_in(answer)] == [(1, 2, 2), (1, 3)]


def test_a_part_differs_only_by_more_than_the_large_numbers_do() -> None:
    assert differ_in_parts([640.0, 0.5], [640.0, 0.51])
    assert not differ_in_parts([640.0, 0.5], [640.01, 0.51])
    assert not differ_in_parts([640.0, 0.5], [640.0, 0.50001])
    assert not differ_in_parts([640.0, float("nan")], [640.0, float("nan")])
