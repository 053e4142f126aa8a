"""What a worker tries before it counts as loaded: the whole way of a request, without a trace."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
import torch

from pyserve.worker.batch_trial import Verdict
from pyserve.worker.entry_point import HandlerLoadError
from pyserve.worker.sample_requests import picture
from tests.support.tried_handlers import INPUT, Try, attempt

__all__ = ["attempt"]

# --- built-in handlers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handler", "result", "config"),
    [
        ("tensor", "x * 2", {"input": INPUT}),
        ("tensor", "x + others[0]", {"input": [{"name": "a", "shape": [4]}, {"name": "b", "shape": [4]}]}),
        ("tensor", "x.reshape(len(x), -1, 32)", {"input": {"shape": [-1]}}),  # takes sizes that 32 divides
        ("base_handler", "x * 2", {"input": INPUT}),
        ("image_classifier", "x.mean((2, 3)) @ torch.ones(3, 6)", {}),
        ("image_classifier", "x.flatten(1)[:, :5]", {"input": {"shape": [1, 28, 28]}}),
        ("image_segmenter", "{'out': x[:, :2]}", {}),
        ("object_detector", "[{'boxes': each[0, :3, :4], 'labels': torch.ones(3, dtype=torch.int64),"
                            " 'scores': torch.ones(3)} for each in x]", {}),
        ("densenet_handler", "x * 2", {"input": INPUT}),
    ],
)  # fmt: skip
def test_what_can_be_answered_is_loaded(attempt: Try, handler: str, result: str, config: dict[str, Any]) -> None:
    tried = attempt(handler, result=result, config=config, batch_size=2)
    assert tried.verdict.probe == "passed"
    assert tried.model.calls.item() == 0, "trying leaves no state behind"


@pytest.mark.parametrize(
    ("handler", "result", "config", "reason"),
    [
        ("tensor", "(x, object())", {"input": INPUT}, "object"),
        ("tensor", "object()", {"input": INPUT}, "object"),
        ("tensor", "x @ torch.ones(5, 5)", {"input": INPUT}, "cannot be multiplied"),
        ("base_handler", "(x, x)", {"input": INPUT}, "the model answered with a tuple"),
        ("image_classifier", "x", {}, "image_classifier"),
        ("image_segmenter", "[x]", {}, "image_segmenter needs"),
        ("object_detector", "x", {}, "object_detector needs a list with a dict per picture"),
        ("densenet_handler", "None", {"input": INPUT}, "NoneType"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_cause(
    attempt: Try, handler: str, result: str, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(HandlerLoadError) as caught:
        attempt(handler, result=result, config=config)
    assert reason in caught.value.message
    assert "a made-up" in caught.value.message or "made-up pixels" in caught.value.message
    assert caught.value.repeats, "it would not do better another time"
    assert "archive/" not in caught.value.message


def test_a_sample_of_the_archive_that_a_model_cannot_answer_is_refused_with_its_name(attempt: Try) -> None:
    result = "x if float(x.sum()) < 100 else (x, object())"
    with pytest.raises(HandlerLoadError, match=r"tried with sample_input_big\.json and cannot answer it: .*object"):
        attempt(files={"sample_input_big.json": "[1, 2, 3, 100]"}, result=result)


def test_a_sample_that_is_no_input_of_the_model_is_a_warning(attempt: Try, caplog: pytest.LogCaptureFixture) -> None:
    tried = attempt(files={"sample_input.json": "[1, 2]"}, batch_size=2)
    assert tried.verdict.probe == "passed"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "sample_input.json was not answered: expected float32 [4]" in record.getMessage()


def test_a_model_that_takes_another_input_than_described_is_loaded_if_it_answers_a_sample(
    attempt: Try, caplog: pytest.LogCaptureFixture
) -> None:
    result = "x if x.shape[1] == 7 else x @ torch.ones(5, 5)"
    sample = json.dumps([1.0] * 7)
    attempt(files={"sample_input.json": sample}, result=result, config={"input": {"shape": [-1]}})
    assert "a made-up tensor [16] was not answered" in caplog.text


def test_without_a_described_input_nothing_is_made_up(attempt: Try) -> None:
    tried = attempt("base_handler", result="x", config={})
    assert tried.verdict == Verdict(probe="not probed: no sample_input* file in the archive that it answers")


def test_pictures_of_one_size_prove_nothing_of_a_detector_for_another(
    attempt: Try, caplog: pytest.LogCaptureFixture
) -> None:
    attempt("object_detector", result="x.reshape(len(x), 3, 640, 640)", config={})
    assert "a made-up picture was not answered" in caplog.text


# --- nothing stays ----------------------------------------------------------------------------------------------------

OWN = """
    import random
    import numpy as np
    import torch

    CALLS = []

    class Handler:
        def initialize(self, context):
            self.model = torch.nn.BatchNorm1d(2).train()  # a call changes its statistics
            context.metrics.add_counter("loads", 1)

        def handle(self, data, context):
            CALLS.append((len(data), data[0]["body"], context.get_request_header(0, "content-type")))
            self.model(torch.rand(3, 2))
            np.random.random(), random.random()
            context.metrics.add_counter("calls", len(data))
            return [{"sum": float(sum(row["body"]))} for row in data]
"""


def test_own_handlers_are_sent_the_archives_samples_and_nothing_stays(attempt: Try) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1).item(), np.random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    files = {"handler.py": OWN, "sample_input.json": "[1, 2]"}
    tried = attempt("handler.py", files, result="x", config={})
    calls = tried.entry.code.module.CALLS  # type: ignore[union-attr]
    assert calls[0] == (1, [1, 2], "application/json")
    assert tried.model.num_batches_tracked.item() == 0
    assert tried.model.running_mean.tolist() == [0, 0]
    assert (torch.rand(1).item(), np.random.random()) == expected
    emitted = {each["name"]: each["value"] for each in tried.context.metrics.drain()}
    assert emitted == {"loads": 1.0}
    assert not tried.context.metrics.request_ids
    tried.context.metrics.add_counter("calls", 1)
    assert [each["name"] for each in tried.context.metrics.drain()] == ["calls"], "later ones count"


def test_what_a_built_in_handler_says_once_is_kept_for_its_clients(
    attempt: Try, caplog: pytest.LogCaptureFixture
) -> None:
    tried = attempt("base_handler", result="x / 0 * 0")
    assert not caplog.records
    assert tried.entry.handler.context is tried.context
    answer = tried.entry([{"body": [1.0, 2.0, 3.0, 4.0]}], tried.context.for_batch(["a"], [[]]))
    assert answer
    assert "NaN or infinite" in caplog.text


# --- own handlers that fail -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing (handler.py:4 in handle)"),
        ("return [object()]", "cannot become JSON"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_an_own_handler_that_fails_is_loaded_with_a_warning(
    attempt: Try, caplog: pytest.LogCaptureFixture, body: str, reason: str
) -> None:
    source = f"\ndef handle(data, context):\n    if data is not None:\n        {body}\n"
    attempt("handler.py", {"handler.py": source, "sample_input.txt": "hello"})
    (record,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "the archive's sample_input.txt was not answered" in record.getMessage()
    assert reason in record.getMessage()


def test_an_own_handler_that_hangs_is_interrupted(attempt: Try, caplog: pytest.LogCaptureFixture) -> None:
    source = """
        import time

        def handle(data, context):
            while data is not None:
                try:
                    time.sleep(60)
                except Exception:
                    pass
    """
    tried = attempt("handler.py", {"handler.py": source, "sample_input.txt": "x"}, startup_timeout_s=2.0)
    assert tried.verdict.probe == "not probed: trying it took too long"
    assert "was not tried out to the end within half of startup_timeout=2 s" in caplog.text


def test_streams_of_an_own_handler_are_dropped(attempt: Try, caplog: pytest.LogCaptureFixture) -> None:
    source = """
        def handle(data, context):
            if data is not None:
                return parts(len(data))

        def parts(count):
            for number in range(3):
                yield [f"{number}.5"] * count
    """
    tried = attempt("handler.py", {"handler.py": source, "sample_input.txt": "x"}, batch_size=2)
    assert tried.verdict.probe == "passed"
    assert not caplog.records


@pytest.mark.parametrize(
    "settings", [{"mode": "continuous"}, {"mode": "async"}, {"config": {"sequenceBatching": True}}]
)
def test_steps_of_something_longer_are_not_tried(attempt: Try, settings: dict[str, Any]) -> None:
    source = """
        CALLS = []

        def handle(data, context):
            CALLS.append(data)
    """
    tried = attempt("handler.py", {"handler.py": source, "sample_input.txt": "x"}, **settings)
    assert tried.entry.code.module.CALLS == [None]  # type: ignore[union-attr]
    assert tried.verdict.probe.startswith("not probed: ")


def test_pictures_are_different_and_the_same_every_time() -> None:
    assert picture(3) == picture(3) != picture(4)
