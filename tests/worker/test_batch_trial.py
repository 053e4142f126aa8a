"""Models whose answers depend on the batch are found when they are loaded, and others are not suspected."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pyserve.proof.batch_probe import RowNumbers
from pyserve.proof.comparison import ROUNDING, difference
from pyserve.worker.batch_trial import FIX, Verdict, batch_steps, comparable, value_of
from tests.support.tried_handlers import INPUT, Try, attempt

__all__ = ["attempt"]

GRU = """
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.GRU(4, 3, batch_first={first})

        def forward(self, x):
            return self.layer(x)[0]
"""
QUANTIZED = """
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.ao.quantization.quantize_dynamic(
                torch.nn.Sequential(torch.nn.Linear(4, 4)), {torch.nn.Linear}, dtype=torch.qint8
            )

        def forward(self, x):
            return self.layer(x)
"""
CARRYING = """
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", torch.zeros(4))

        def forward(self, x):
            answer = x + self.last
            self.last = x[-1].clone()
            return answer
"""

STEPS = {"input": {"dtype": "float32", "shape": [5, 4]}}


@pytest.mark.parametrize(
    ("handler", "files", "result", "config"),
    [
        ("tensor", {}, "torch.softmax(x, 0)", None),
        ("tensor", {}, "x - x.mean(0)", None),
        ("tensor", {}, "torch.nn.functional.batch_norm(x, None, None, training=True) if len(x) > 1 else x * 0", None),
        ("tensor", {}, "x.flip(0)", None),
        ("tensor", {}, "x.cumsum(0)", None),
        ("tensor", {}, "x[:1].expand(len(x), 4)", None),
        ("tensor", {}, "(x * 2, x + x.max())", None),
        ("tensor", {}, "{'kept': x, 'place': torch.arange(len(x))}", None),
        ("tensor", {"model.py": GRU.format(first=False)}, "", STEPS),
        ("tensor", {"model.py": QUANTIZED}, "", None),
        ("base_handler", {}, "x / x.abs().sum()", None),
        ("image_classifier", {}, "torch.softmax(x.mean((2, 3)), 0)", {}),
        ("densenet_handler", {}, "torch.softmax(x, 0)", {"input": {"shape": [3, 4, 4]}}),
    ],
)  # fmt: skip
def test_a_model_whose_answers_depend_on_the_batch_is_found(
    attempt: Try, handler: str, files: dict[str, str], result: str, config: dict[str, Any] | None
) -> None:
    verdict = attempt(handler, files, result=result, config=config, batch_size=8).verdict
    assert verdict.probe.startswith("answers depend on the batch: row ")
    assert verdict.note == f"batches hold one request: {verdict.probe}; {FIX}"


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_small_batch_size_may_be_raised_and_so_is_tried_too(
    attempt: Try, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyserve.worker.batch_trial.IDLE_ANSWER_TIME_MAX_S", 10.0)
    assert attempt(result="torch.softmax(x, 0)", batch_size=batch_size).verdict.note


@pytest.mark.parametrize(
    ("handler", "files", "result", "config"),
    [
        ("tensor", {}, "torch.softmax(x, 1)", None),
        ("tensor", {}, "x @ torch.randn(4, 300, generator=torch.Generator().manual_seed(1))", None),
        ("tensor", {}, "x / 0 * 0", None),
        ("tensor", {}, "x.to(torch.bfloat16) @ torch.ones(4, 4).bfloat16()", None),
        ("tensor", {"model.py": GRU.format(first=True)}, "", STEPS),
        ("tensor", {"model.py": CARRYING}, "", {"input": {"shape": [4], "values": [1, 1]}}),
        ("image_classifier", {}, "torch.nn.functional.conv2d(x, torch.ones(6, 3, 5, 5) / 75).mean((2, 3))", {}),
        ("object_detector", {}, "[{'boxes': each[0, :3, :4], 'labels': torch.ones(3, dtype=torch.int64),"
                                " 'scores': torch.ones(3)} for each in x]", {}),
        ("densenet_handler", {}, "torch.softmax(x, 1)", {"input": {"shape": [3, 4, 4]}}),
    ],
)  # fmt: skip
def test_a_model_whose_answers_do_not_is_not_suspected(
    attempt: Try, handler: str, files: dict[str, str], result: str, config: dict[str, Any] | None
) -> None:
    assert attempt(handler, files, result=result, config=config, batch_size=5).verdict == Verdict(probe="passed")


RARE = [
    ("x * 2 if x.max() > 1e6 else x", "__bool__"),
    ("x * float(x.max() > 1e6)", "__float__"),
    ("x + x.max().item() * 1e-30", "item"),
    ("x if torch.equal(x, x) else -x", "equal"),
]


@pytest.mark.parametrize(("result", "read"), RARE)
def test_a_branch_that_only_rare_numbers_take_is_seen_in_the_code(attempt: Try, result: str, read: str) -> None:
    verdict = attempt(result=result, batch_size=4).verdict
    assert verdict.probe == f"its forward looks at the numbers of a whole batch ({read})"
    assert verdict.note == f"batches hold one request: {verdict.probe}; {FIX}"


@pytest.mark.parametrize("result", ["x if len(x) < 100 else x * 2", "x[:, : x.shape[1]]", "x.reshape(len(x), -1)"])
def test_sizes_are_no_numbers_of_a_request(attempt: Try, result: str) -> None:
    assert attempt(result=result, batch_size=4).verdict == Verdict(probe="passed")


def test_torchscript_is_searched_too(attempt: Try, tmp_path: Any) -> None:
    class Branching(torch.nn.Module):
        def forward(self, numbers: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            scores = numbers.float()[offsets].unsqueeze(1).repeat(1, 2)
            if bool((numbers > 1_000_000).any()):
                scores = scores * 2
            return scores

    torch.save({"one": 1, "two": 2, "three": 3}, tmp_path / "vocabulary")
    torch.jit.script(Branching()).save(str(tmp_path / "model.pt"))
    files = {name: (tmp_path / path).read_bytes()
             for name, path in (("source_vocab.pt", "vocabulary"), ("model.pt", "model.pt"))}  # fmt: skip
    model = {"serializedFile": "model.pt"}
    verdict = attempt("text_classifier", files, config={}, model=model, batch_size=4).verdict
    assert verdict.probe.startswith("its forward looks at the numbers of a whole batch (")


def test_texts_of_different_length_are_tried_together(attempt: Try, tmp_path: Any) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "be", "see"]
    torch.save({word: number for number, word in enumerate(words)}, tmp_path / "vocabulary")
    files = {"source_vocab.pt": (tmp_path / "vocabulary").read_bytes()}
    bag = "torch.nn.functional.embedding_bag(x, torch.arange(52.0).view(13, 4), others[0], mode='sum')"
    assert attempt("text_classifier", files, result=bag, config={}, batch_size=4).verdict.probe == "passed"
    verdict = attempt("text_classifier", files, result=f"{bag}.softmax(0)", config={}, batch_size=4).verdict
    assert verdict.probe.startswith("answers depend on the batch")


def test_who_says_that_it_is_meant_is_believed(attempt: Try) -> None:
    config = {"input": INPUT, "batchDependent": "allowed"}
    verdict = attempt(result="torch.softmax(x, 0)", config=config, batch_size=8).verdict
    assert verdict == Verdict(probe="not probed: batchDependent: allowed")


def test_a_model_that_takes_one_item_only_runs_alone(attempt: Try) -> None:
    verdict = attempt(result="x.view(4)[None]", batch_size=4).verdict
    assert verdict.probe.startswith("a batch of 2 cannot be run: RuntimeError: shape '[4]' is invalid")
    assert "batches hold one request" in verdict.note


def test_a_model_that_answers_with_one_row_for_all_is_found(attempt: Try) -> None:
    verdict = attempt(result="x.mean(0, keepdim=True)", batch_size=4).verdict
    assert verdict.probe.startswith("answers depend on the batch: row 1 of 2 has a relative difference of ")


def test_a_model_that_draws_random_numbers_has_no_right_answer_to_compare_with(attempt: Try) -> None:
    verdict = attempt(result="x + torch.rand(1)", batch_size=4).verdict
    assert verdict == Verdict(probe="not probed: its answers to the same request differ from call to call")


def test_a_batch_that_does_not_fit_into_memory_says_nothing(attempt: Try) -> None:
    model = """
        import torch

        class Model(torch.nn.Module):
            def forward(self, x):
                if len(x) > 1:
                    raise MemoryError
                return x
    """
    assert attempt(files={"model.py": model}, batch_size=4).verdict.probe == "passed"


def test_a_slow_model_is_not_tried_with_more_than_it_is_to_run(attempt: Try, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyserve.worker.batch_trial.IDLE_ANSWER_TIME_MAX_S", 0.0)
    verdict = attempt(result="torch.softmax(x, 0)", batch_size=1).verdict
    assert (verdict.note, verdict.probe) == ("", "not probed: it was loaded with batch size 1")
    assert verdict.raised_note == f"batches hold one request, since it was loaded with batch size 1; {FIX}"
    monkeypatch.setattr("pyserve.worker.batch_trial.ANSWER_TIME_MAX_S", 0.0)
    verdict = attempt(result="x", batch_size=2).verdict
    assert verdict.note == f"batches hold one request, since one answer takes 0 s; {FIX}"


@pytest.mark.parametrize(
    ("batch_size", "answer_s", "sizes"),
    [(1, 1e-4, [2, 3]), (2, 1e-4, [2]), (3, 1e-4, [2, 3]), (8, 1e-4, [2, 8, 3, 4, 5, 6, 7]),
     (40, 1e-3, [2, 40, 3, 4, 5, 6, 7, 8, 16, 32]), (64, 0.2, [2, 8, 3, 4, 5, 6, 7]),
     (65_536, 1e-3, [2, 500, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256])],
)  # fmt: skip
def test_all_small_sizes_are_tried_and_first_those_that_show_most(
    batch_size: int, answer_s: float, sizes: list[int]
) -> None:
    steps = batch_steps(RowNumbers.of(8, 2, 3), batch_size, answer_s)
    assert [len(step.numbers) for step in steps if not step.what] == sizes
    assert sum(bool(step.what) for step in steps[1:4]) >= 2


@pytest.mark.parametrize(("answer_s", "widths"), [(0.001, [4, 8]), (0.1, [2, 2, 2])])
def test_special_batches_of_a_slow_model_are_pairs(answer_s: float, widths: list[int]) -> None:
    steps = batch_steps(RowNumbers.of(8, 2, 3), 8, answer_s)
    assert [len(step.numbers) for step in steps if step.what] == widths


NO_ROOM = "x * (torch.nn.functional.one_hot(x.argmax(1), 4).cumsum(0).max(1).values <= 3).float()[:, None]"
COPIES = "x.masked_fill(((torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T).tril(-1) > 0.99)"


@pytest.mark.parametrize(
    ("result", "where"),
    [
        ("torch.where(torch.isnan(x).any(), torch.zeros_like(x), x)", "4 with NaN or infinities in another item"),
        ("torch.eye(len(x)) @ x", "4 with NaN or infinities in another item"),
        ("torch.where(torch.isinf(x).any(), -x, x)", "4 with NaN or infinities in another item"),
        ("x * (1 - (x[:, None] - x[None]).abs().amax(2).lt(0.05).float().tril(-1).amax(1, True))", "8 like items"),
        (COPIES + ".any(1, keepdim=True), 0.0)", ""),
        ("x + x.mean(0) if 4 <= len(x) < 8 else x", ""),
        ("x + x.mean(0) if len(x) == 7 else x", "7"),
    ],
)  # fmt: skip
def test_what_unlike_items_of_one_size_do_not_show_is_found(attempt: Try, result: str, where: str) -> None:
    verdict = attempt(result=result, batch_size=8).verdict
    assert verdict.probe.startswith("answers depend on the batch: row ")
    assert f" of {where}" in verdict.probe
    assert verdict.note


def test_numbers_are_not_infinite_where_the_model_takes_none_that_are(attempt: Try) -> None:
    result = "torch.where(torch.isnan(x).any() | torch.isinf(x).any(), torch.zeros_like(x), x)"
    config = {"input": {"dtype": "float32", "shape": [4], "values": [0, 1]}}
    assert attempt(result=result, config=config, batch_size=8).verdict == Verdict(probe="passed")


def test_a_model_that_fails_for_nan_is_tried_without_it(attempt: Try) -> None:
    result = "torch.arange(9.0)[x.nan_to_num(99, 99).clamp(0, 99).div(40).long().where(x == x, 9)]"
    assert attempt(result=result, batch_size=8).verdict == Verdict(probe="passed")


# --- handlers of the archive's own ------------------------------------------------------------------------------------

OWN = """
    import torch

    def handle(data, context):
        if data is None:
            return
        x = torch.tensor([row["body"] for row in data], dtype=torch.float32)
        return {result}
"""
SAMPLES = {"sample_input1.json": "[1, 2]", "sample_input2.json": "[5, -3]"}


def own(attempt: Try, result: str, files: dict[str, str] | None = None, **settings: Any) -> Verdict:
    """The verdict on a handler that answers with ``result`` of the numbers ``x`` of a batch."""
    named = {"handler.py": OWN.format(result=result), **(SAMPLES if files is None else files)}
    return attempt("handler.py", named, config={}, **{"batch_size": 4, **settings}).verdict


@pytest.mark.parametrize(
    "result",
    [
        "torch.softmax(x, 0).tolist()",
        "[{'label': 'cat', 'score': score} for score in x.softmax(0)[:, 0].tolist()]",
        "[f'the score is {score:.4f}' for score in x.softmax(0)[:, 0].tolist()]",
        "[row.numpy().tobytes().hex() for row in x.flip(0)]",
    ],
)
def test_whole_answers_of_an_own_handler_are_compared(attempt: Try, result: str) -> None:
    verdict = own(attempt, result)
    assert verdict.probe.startswith("answers depend on the batch: row ")
    assert verdict.note


@pytest.mark.parametrize(
    "result",
    [
        "torch.softmax(x, 1).tolist()",
        "[{str(i): each for i, each in enumerate(row)} for row in x.softmax(1).tolist()]",
        "[f'the score is {score:.4f}' for score in x.softmax(1)[:, 0].tolist()]",
        "[row.numpy().tobytes() for row in x]",
        "list(x.unbind())",
    ],
)
def test_own_handlers_that_keep_rows_apart_are_not_suspected(attempt: Try, result: str) -> None:
    assert own(attempt, result) == Verdict(probe="passed")


INHERITING = """
    from ts.torch_handler.{module} import {base}

    class Handler({base}):
        def postprocess(self, output):
            raise AssertionError("own code is not called without a sample")
{more}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "base", "result", "config"),
    [
        ("base_handler", "BaseHandler", "x.softmax(0)", {"input": INPUT}),
        ("vision_handler", "VisionHandler", "x.mean((2, 3)).softmax(0)", {}),
        ("image_classifier", "ImageClassifier", "x.mean((2, 3)).softmax(0)", {}),
    ],
)
def test_the_network_of_a_handler_that_inherits_the_way_to_it_is_tried(
    attempt: Try, module: str, base: str, result: str, config: dict[str, Any]
) -> None:
    files = {"handler.py": INHERITING.format(module=module, base=base, more="")}
    verdict = attempt("handler.py", files, result=result, config=config, batch_size=3).verdict
    assert verdict.probe.startswith("answers depend on the batch")
    assert verdict.note
    verdict = attempt("handler.py", files, result="x", config=config, batch_size=3).verdict
    assert verdict == Verdict(probe="passed")


@pytest.mark.parametrize(
    ("more", "config"),
    [
        ("        def preprocess(self, data):\n            raise AssertionError", {"input": INPUT}),
        ("        def handle(self, data, context):\n            raise AssertionError", {"input": INPUT}),
        ("", {}),
        ("", {"input": {"shape": [5]}}),
    ],
)
def test_a_network_that_nothing_is_known_of_is_believed(attempt: Try, more: str, config: dict[str, Any]) -> None:
    files = {"handler.py": INHERITING.format(module="base_handler", base="BaseHandler", more=more)}
    result = "(x @ torch.ones(4, 4)).softmax(0)"
    verdict = attempt("handler.py", files, result=result, config=config, batch_size=3).verdict
    assert verdict == Verdict(probe="not probed: no sample_input* file in the archive that it answers")


def test_one_sample_shows_what_a_batch_of_the_same_row_changes(attempt: Try) -> None:
    files = {"sample_input.json": "[1, 2]"}
    assert own(attempt, "torch.softmax(x, 0).tolist()", files).note


@pytest.mark.parametrize(
    ("result", "files", "probe"),
    [
        ("x.tolist()", {}, "not probed: no sample_input* file in the archive that it answers"),
        ("[context.get_request_id(index) for index in range(len(data))]", None, "passed"),
        ("[context.metrics.__class__.__name__ + str(torch.rand(1).item())] * len(data)", None,
         "not probed: its answers to the same request differ from call to call"),
        ("[[len(data)]] * len(data) if len(data) < 2 else 1 / 0", None, "passed"),  # tried again one by one
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_believed_of_an_own_handler(
    attempt: Try, result: str, files: dict[str, str] | None, probe: str
) -> None:
    assert own(attempt, result, files) == Verdict(probe=probe)


def test_an_own_handler_that_fails_for_batches_says_nothing_where_they_are_not_divided(attempt: Try) -> None:
    verdict = own(attempt, "x.tolist() if len(x) < 2 else 1 / 0", isolate_errors=False)
    assert verdict == Verdict(probe="not probed: a batch of 2 of the archive's samples is answered with an error")


def test_an_own_handler_is_not_tried_with_more_than_it_is_to_run(attempt: Try) -> None:
    assert own(attempt, "x.softmax(0).tolist()", batch_size=1) == Verdict(
        probe="not probed: it was loaded with batch size 1"
    )


# --- answers as values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "is_close"),
    [
        (b"[1.0, 2.0]", b"[1.000001, 2.0]", True),
        (b"[1.0, 2.0]", b"[1.001, 2.0]", False),
        (b'{"cat": 1e-7, "dog": 0.9}', b'{"dog": 0.9, "cat": 2e-7}', True),
        (b'{"cat": 0.1, "dog": 0.9}', b'{"cow": 0.1, "dog": 0.9}', False),
        (b'{"score": 0.5, "label": "cat"}', b'{"score": 0.5, "label": "dog"}', False),
        (b"score: 0.500001", b"score: 0.500002", True),
        (b"score: 0.5", b"score: 0.6", False),
        (b"\xff\x00", b"\xff\x01", False),
        (b"[3]", b"[4]", False),
    ],
)
def test_answers_are_compared_number_by_number(one: bytes, other: bytes, is_close: bool) -> None:
    found = difference(value_of(200, b"", one), value_of(200, b"", other))
    assert (found <= ROUNDING["fp32"]) is is_close


def test_raw_tensors_are_read_as_their_headers_say() -> None:
    head = b"\ncontent-type\napplication/octet-stream\nx-tensor-dtype\nfloat32\nx-tensor-shape\n2"
    _, tensor = value_of(200, head, torch.tensor([1.5, 2.5]).numpy().tobytes())
    assert torch.equal(tensor, torch.tensor([1.5, 2.5]))
    assert comparable(json.loads('{"a": {"b": 1.0, "a": 2.0}}')) == {"a": [["a", "b"], [2.0, 1.0]]}
