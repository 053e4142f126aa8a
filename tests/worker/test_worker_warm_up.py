"""What a worker process runs before it counts as loaded: samples and sizes of ``pad_to``, in batches of all sizes."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from pyserve.archive.samples import Sample
from pyserve.worker.failure import HandlerTimeout
from pyserve.worker.warm_up import TOO_LONG, Tried, WarmUp, sizes_up_to
from tests.support.tried_handlers import INPUT, Try, attempt

__all__ = ["attempt"]

OWN = """
    CALLS = []

    class Handler:
        def initialize(self, context):
            pass

        def handle(self, data, context):
            CALLS.append([row["body"] for row in data])
            return [{"sum": sum(row["body"])} for row in data]
"""
A, B = Sample("a", b"1", "text/plain"), Sample("b", b"2", "text/plain")


@pytest.mark.parametrize(
    ("largest", "wanted", "sizes"),
    [
        (1, None, [1]), (2, None, [1, 2]), (8, None, [1, 2, 4, 8]), (9, None, [1, 2, 4, 8, 9]),
        (32, None, [1, 2, 4, 8, 12, 16, 24, 32]), (20, [4, 1, 64, 16], [1, 4, 16, 20]), (4, False, [1, 2, 4]),
    ],
)  # fmt: skip
def test_the_sizes_are_those_of_the_native_lane(largest: int, wanted: object, sizes: list[int]) -> None:
    assert sizes_up_to(largest, wanted) == sizes


def test_alone_and_the_largest_come_first_and_no_size_twice() -> None:
    ran: list[tuple[str, int]] = []

    def run(sample: Sample, size: int) -> Tried:
        ran.append((sample.name, size))
        return Tried(0.0)

    warm_up = WarmUp(run, float("inf"), [])
    warm_up.note_answered(A, 0.0)
    warm_up.run_all([A, B], [1, 2, 4, 8])
    assert ran == [("a", 8), ("b", 1), ("b", 8), ("a", 2), ("b", 2), ("a", 4), ("b", 4)]
    assert warm_up.findings() == {"rows": {"a": [1, 2, 4, 8], "b": [1, 2, 4, 8]}}


def test_what_would_take_too_long_is_left_out_and_named() -> None:
    warm_up = WarmUp(lambda sample, size: Tried(0.0), 0.0, [])
    warm_up.run_all([A], [1, 4])
    assert warm_up.findings() == {"rows": {}, "leftOut": [f"a, 1 row: {TOO_LONG}", f"a, 4 rows: {TOO_LONG}"]}


def test_a_time_that_is_over_ends_it_with_a_note() -> None:
    def run(sample: Sample, size: int) -> Tried:
        raise HandlerTimeout("over")

    notes: list[str] = []
    warm_up = WarmUp(run, float("inf"), notes)
    warm_up.run_all([A], [1])
    assert warm_up.findings() == {} and "startupTimeout" in notes[0]


# --- handlers ---------------------------------------------------------------------------------------------------------


def files_of(*names: str) -> dict[str, str]:
    return {"handler.py": OWN, **{name: json.dumps([number + 1, 2]) for number, name in enumerate(names)}}


def test_files_of_the_warmup_folder_are_run_alone_and_in_batches_of_all_sizes(attempt: Try) -> None:
    tried = attempt("handler.py", files_of("warmup/long.json", "warmup/short.json"), config={}, batch_size=4)
    calls = tried.entry.code.module.CALLS  # type: ignore[union-attr]
    for body in ([1, 2], [2, 2]):
        assert sorted(len(rows) for rows in calls if rows == [body] * len(rows)) == [1, 2, 4]
    assert tried.verdict.warm_up == {"rows": {"warmup/long.json": [1, 2, 4], "warmup/short.json": [1, 2, 4]}}


def test_samples_are_run_in_batches_too(attempt: Try) -> None:
    tried = attempt("handler.py", files_of("sample_input.json"), config={}, batch_size=8)
    assert tried.verdict.warm_up == {"rows": {"sample_input.json": [1, 2, 4, 8]}}


def test_a_handler_whose_calls_have_effects_is_sent_each_file_once(attempt: Try) -> None:
    files = files_of("warmup/a.json")
    tried = attempt("handler.py", files, config={}, batch_size=8, has_side_effects=True)
    assert tried.entry.code.module.CALLS == [[[1, 2]]]  # type: ignore[union-attr]


def test_a_file_that_is_not_answered_is_a_warning_with_its_name(attempt: Try, caplog: pytest.LogCaptureFixture) -> None:
    files: dict[str, Any] = {
        **files_of(),
        "warmup/bad.json": '["x", 1]',
        "warmup/good.json": "[3, 4]",
        "warmup/x.gif": "x",
    }
    tried = attempt("handler.py", files, config={}, batch_size=2)
    assert tried.verdict.warm_up["rows"] == {"warmup/good.json": [1, 2]}
    assert (
        len(tried.verdict.warm_up["leftOut"]) == 1 and "warmup/bad.json, 1 row: " in tried.verdict.warm_up["leftOut"][0]
    )
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert any("warmup/bad.json was not answered" in text for text in warnings)
    assert any("warmup/x.gif" in text and ".json" in text for text in warnings), warnings


def test_every_size_of_pad_to_is_run(attempt: Try) -> None:
    spec = {"dtype": "float32", "shape": [-1], "pad_to": [4, 16, 64]}
    tried = attempt(config={"input": spec}, batch_size=2, files={"model.py": MODEL_OF_SHAPES})
    rows = tried.verdict.warm_up["rows"]
    assert rows["pad_to 16"] == rows["pad_to 64"] == [1, 2]
    assert {(rows, size) for rows in (1, 2) for size in (4, 16, 64)} <= set(tried.model.shapes)


MODEL_OF_SHAPES = """
    import torch

    class Model(torch.nn.Module):
        shapes = []  # of the class: what a model has itself is restored

        def forward(self, x):
            self.shapes.append(tuple(x.shape))
            return x
"""


def test_a_model_whose_answers_depend_on_the_batch_is_not_run_in_batches(attempt: Try) -> None:
    tried = attempt(result="x - x.mean(0)", config={"input": INPUT}, batch_size=4)
    assert tried.verdict.note
    assert all(sizes == [1] for sizes in tried.verdict.warm_up["rows"].values())
