"""What one request's call leaves in memory never reaches another's answer: reused buffers, rows written to, parts."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyserve.request.codec import encode_result
from pyserve.telemetry.custom_metrics import MetricsReport
from pyserve.worker.answer import ERROR, Answer, Parts
from pyserve.worker.continuous import serve_continuously
from pyserve.worker.coroutines import serve_coroutines
from pyserve.worker.request import Item
from tests.support.loaded_handlers import JSON, Load, Loaded, load, request
from tests.support.tried_handlers import Try, attempt

__all__ = ["attempt", "load"]

# Answers in a buffer that it uses again, and cannot take more than one row at a time.
REUSING = """
    import numpy as np

    BUFFER = {buffer}

    def handle(data, context):
        if data is None:
            return
        BUFFER[0] = data[0]["body"]
        if len(data) > 1:
            raise ValueError("one at a time")
        return [{answer}]
"""


@pytest.mark.parametrize(
    ("buffer", "answer", "wanted"),
    [
        ("bytearray(1)", "BUFFER", [b"\x01", b"\x02", b"\x03"]),
        ("bytearray(1)", "memoryview(BUFFER)", [b"\x01", b"\x02", b"\x03"]),
        ("np.zeros(1, np.uint8)", "BUFFER.data", [b"\x01", b"\x02", b"\x03"]),
        ("[0]", "BUFFER", [b"[1]", b"[2]", b"[3]"]),
    ],
)  # fmt: skip
def test_answers_of_calls_that_share_a_buffer_are_each_their_own(
    load: Load, buffer: str, answer: str, wanted: list[bytes]
) -> None:
    answers = load(REUSING.format(buffer=buffer, answer=answer)).ask(1, 2, 3)
    assert [b"".join(each.body.split()) if b"[" in each.body else each.body for each in answers] == wanted


# Halves what it was given where it lies, and fails for a zero.
HALVING = """
    import numpy as np

    def handle(data, context):
        if data is None:
            return
        rows = []
        for row in data:
            numbers = np.frombuffer(row["{field}"], np.float32)
            numbers /= 2
            rows.append(numbers)
        for numbers in rows:
            if not numbers.all():
                raise ValueError("a zero")
        {end}
        return [numbers.tolist() for numbers in rows]
"""


def floats(*values: float) -> bytes:
    return torch.tensor(values, dtype=torch.float32).numpy().tobytes()


def test_a_body_that_a_failed_call_wrote_to_is_what_it_was_when_it_is_tried_again(load: Load) -> None:
    halving = load(HALVING.format(field="body", end=""))
    first, broken, last = halving.run(request(floats(8, 4)), request(floats(0)), request(floats(2, 6)))
    assert (first.value, last.value) == ([4.0, 2.0], [1.0, 3.0])
    assert broken.is_error


def test_memory_that_was_too_little_leaves_bodies_as_they_were(load: Load) -> None:
    halving = load(HALVING.format(field="body", end="if len(rows) > 1: raise MemoryError"))
    answers = halving.run(*[request(floats(value)) for value in (2, 4, 6)])
    assert [answer.value for answer in answers] == [[1.0], [2.0], [3.0]]


def test_a_field_of_a_form_is_what_it_was_too(load: Load) -> None:
    def form(value: float) -> Item:
        head = b'--B\r\nContent-Disposition: form-data; name="x"\r\n\r\n'
        return request(head + floats(value) + b"\r\n--B--\r\n", "multipart/form-data; boundary=B")

    halving = load(HALVING.format(field="x", end=""))
    first, _, last = halving.run(form(8), form(0), form(2))
    assert (first.value, last.value) == ([4.0], [1.0])


# --- explanations -----------------------------------------------------------------------------------------------------

EXPLAINING = """
    from ts.torch_handler.base_handler import BaseHandler

    CALLS = []

    class Handler(BaseHandler):
        def initialize(self, context):
            self.model = lambda x: x * 2

        def preprocess(self, data):
            CALLS.append(len(data))
            return super().preprocess([{{"data": row["body"]["data"]}} for row in data])

        def get_insights(self, tensor_data, raw_data, target=0):
            return [{{"explained": row, "class": target}} for row in tensor_data.tolist()]
        {more}
"""
# For whom all explanations of a batch are of one kind is for an own method to say.
TOGETHER = """
        def explain_handle(self, batch, data):
            return [{"explained": row["body"]["data"], "class": row["body"]["target"]} for row in data]
"""


def explaining(value: float, target: int, *, is_explained: bool) -> Item:
    body = json.dumps({"data": [value], "target": target}).encode()
    return request(body, JSON, headers={"explain": str(is_explained)})


@pytest.mark.parametrize(("more", "calls"), [("", [2, 1, 1]), (TOGETHER, [2, 2])], ids=["inherited", "own"])
def test_explanations_and_predictions_of_one_batch_are_each_what_was_asked_for(
    load: Load, more: str, calls: list[int]
) -> None:
    loaded = load(EXPLAINING.format(more=more))
    answers = loaded.run(
        explaining(1, 3, is_explained=True), explaining(2, 0, is_explained=False),
        explaining(4, 5, is_explained=True), explaining(8, 0, is_explained=False),
    )  # fmt: skip
    assert [answer.value for answer in answers] == [
        {"explained": [1.0], "class": 3}, [4.0], {"explained": [4.0], "class": 5}, [16.0]
    ]  # fmt: skip
    assert calls == loaded.module.CALLS


# --- parts ------------------------------------------------------------------------------------------------------------

# Yields one object again and again.
GROWING = """
    import torch

    def handle(data, context):
        if data is None:
            return
        return {answer}

    def parts(rows):
        part = {part}
        for number in range(3):
            part{step}
            yield [part] * rows if rows else part
"""
KINDS = {
    "list": ("[]", ".append(number)", [[0], [0, 1], [0, 1, 2]]),
    "dict": ("{'n': -1}", "['n'] += 1", [{"n": 0}, {"n": 1}, {"n": 2}]),
    "bytearray": ("bytearray(b'4')", "[0] += 1", [5, 6, 7]),
}


@pytest.mark.parametrize("answer", ["parts(len(data))", "[parts(0)] * len(data)"], ids=["batch", "element"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_sent_as_it_was_when_it_was_yielded(load: Load, kind: str, answer: str) -> None:
    part, step, wanted = KINDS[kind]
    loaded = load(GROWING.format(part=part, step=step, answer=answer))
    (last,) = loaded.ask(1)
    assert [json.loads(body) for body in [*loaded.parts.bodies(), last.body]] == wanted


def test_a_part_without_bytes_fails_where_it_is_sent(load: Load) -> None:
    loaded = load(GROWING.format(part="[]", step=".append({number} if number == 1 else number)", answer="parts(1)"))
    (last,) = loaded.ask(1)
    assert [json.loads(body) for body in loaded.parts.bodies()] == [[0]]
    assert last.is_error
    assert "set" in last.detail["text"]


def test_an_error_is_a_part_of_its_own(load: Load) -> None:
    source = """
        def handle(data, context):
            if data is not None:
                return parts(len(data))

        def parts(count):
            yield ["a"] * count
            yield ["b", ValueError("only mine")]
    """
    loaded = load(source)
    first, second = loaded.ask(1, 2)
    assert (first.body, second.detail["text"]) == (b"b", "only mine")


# --- other ways to be called ------------------------------------------------------------------------------------------


class Wire:
    """A channel without a server: hands out batches, keeps answers, and ends."""

    def __init__(self, *batches: list[Item]):
        self.batches = [SimpleNamespace(id=number, items=items) for number, items in enumerate(batches, 1)]
        self.answers: list[Answer] = []
        self._descriptor = os.eventfd(1)

    def receive(self, wait_ms: int) -> Any:
        if self.batches:
            return self.batches.pop(0)
        if wait_ms != 0 or len(self.answers) >= 2:
            raise EOFError
        return None

    def send(self, batch: int, answers: list[Answer]) -> None:
        self.answers += [(*answer[:4], bytes(answer[4])) for answer in answers]

    def begin(self, batch: int) -> None:
        pass

    def cancelled_tickets(self) -> list[int]:
        return []

    def is_cancelled(self, ticket: int) -> bool:
        return False

    def fileno(self) -> int:
        return self._descriptor

    def values(self, ticket: int) -> list[Any]:
        return [json.loads(each[4]) for each in self.answers if each[0] == ticket and each[1] != ERROR]


def report_of(loaded: Loaded) -> MetricsReport:
    return MetricsReport(loaded.context.metrics, lambda values: None)


def test_a_step_that_failed_leaves_bodies_as_they_were(load: Load) -> None:
    loaded = load(HALVING.format(field="body", end=""), mode="continuous")
    wire = Wire([request(floats(8), ticket=1), request(floats(0), ticket=2), request(floats(2), ticket=3)])
    with pytest.raises(EOFError):
        serve_continuously(wire, loaded.invoker, Parts(), loaded.context, report_of(loaded))  # type: ignore[arg-type]
    assert (wire.values(1), wire.values(2), wire.values(3)) == ([[4.0]], [], [[1.0]])


def test_coroutines_that_share_a_buffer_send_the_parts_that_they_yielded(load: Load) -> None:
    source = """
        import asyncio

        BUFFER = [0]

        async def handle(data, context):
            if data is not None:
                return parts(data[0]["body"])

        async def parts(value):
            for number in range(3):
                BUFFER[0] = value + number
                yield BUFFER
                await asyncio.sleep(0)
    """
    loaded = load(source, mode="async")
    bodies = [request(json.dumps(value).encode(), JSON, ticket=value) for value in (10, 20)]
    wire = Wire([bodies[0]], [bodies[1]])

    class Ending(Wire):
        def receive(self, wait_ms: int) -> Any:
            if len(self.answers) >= 6:
                raise EOFError
            return self.batches.pop(0) if self.batches else None

    ending = Ending()
    ending.batches = wire.batches
    with pytest.raises(EOFError):
        serve_coroutines(ending, loaded.invoker, loaded.entry, report_of(loaded))
    assert (ending.values(10), ending.values(20)) == ([10, 11, 12], [20, 21, 22])


# --- models that answer with memory of their own ---------------------------------------------------------------------

OWN_MEMORY = """
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", torch.zeros(2))

        def forward(self, x, *others):
            self.last.copy_(torch.stack([x.sum(), -x.sum()]))
            return self.last
"""


def saved(*values: float) -> bytes:
    file = io.BytesIO()
    torch.save(torch.tensor([values], dtype=torch.float32), file)
    return file.getvalue()


def test_saved_tensors_of_a_model_that_answers_with_its_buffer_are_each_their_own(attempt: Try) -> None:
    tried = attempt("densenet_handler", {"model.py": OWN_MEMORY}, batch_size=3)
    assert tried.verdict.probe == "passed"
    rows = [{"body": bytearray(saved(value, 0, 0, 0))} for value in (1, 2, 3)]
    answers = tried.entry(rows, tried.context.for_batch(["a", "b", "c"], [[]] * 3))
    assert [answer.tolist() for answer in answers] == [[1, -1], [2, -2], [3, -3]]


def test_texts_for_a_model_that_answers_with_its_buffer_are_each_their_own(attempt: Try, tmp_path: Path) -> None:
    torch.save({"one": 1, "two": 2, "three": 3}, tmp_path / "vocabulary")
    files = {"model.py": OWN_MEMORY, "source_vocab.pt": (tmp_path / "vocabulary").read_bytes()}
    tried = attempt("text_classifier", files, config={}, batch_size=3)
    assert tried.verdict.probe == "passed"
    rows = [{"body": text} for text in ("one", "two", "three")]
    answers = tried.entry(rows, tried.context.for_batch(["a", "b", "c"], [[]] * 3))
    expected = [torch.tensor([value, -value]).softmax(0).tolist() for value in (1.0, 2.0, 3.0)]
    assert [list(answer.values()) for answer in answers] == [pytest.approx(each) for each in expected]


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_that_is_answered_as_a_tensor_does_not_bring_the_others_along(row: int) -> None:
    batch = torch.arange(2000.0).view(2, 1000)
    content = bytes(encode_result(batch[row]))
    assert torch.equal(torch.load(io.BytesIO(content)), batch[row])
    other = batch[1 - row].numpy().tobytes()
    assert other[400:440] not in content
    assert len(content) < 6000


def test_tensors_of_all_kinds_are_still_answered() -> None:
    for tensor in (torch.eye(3).to_sparse(), torch.ones(2, requires_grad=True)[:1], torch.zeros(0), torch.eye(4).T[1:]):
        loaded = torch.load(io.BytesIO(bytes(encode_result(tensor))))
        assert torch.equal(loaded.to_dense(), tensor.to_dense())
