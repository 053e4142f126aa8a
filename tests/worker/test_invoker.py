"""A batch in, one answer per request out: rows, shapes, retries, encoding, and whatever a handler may raise."""

from __future__ import annotations

import json
import logging
import math
import sys
import types
from typing import Any

import pytest

from pyserve.request import codec
from pyserve.worker.answer import ANSWER, ERROR, RAN_TWICE
from tests.support.loaded_handlers import ECHO, JSON, Load, load, request, warnings_in

__all__ = ["load"]

# Each call is kept in CALLS; the value of a row says what to do for it.
ACTS = """
    import asyncio
    from ts.utils.util import PredictionException

    CALLS = []


    def act(value):
        if value == "timeout":
            from pyserve.worker.failure import HandlerTimeout
            raise HandlerTimeout("as the signal raises it")
        if isinstance(value, str) and value.startswith("raise "):
            raise {"value": ValueError, "memory": MemoryError, "keyboard": KeyboardInterrupt, "exit": SystemExit,
                   "generator": GeneratorExit, "cancelled": asyncio.CancelledError}[value[6:]]("by the handler")
        if isinstance(value, dict) and "code" in value:
            raise PredictionException(value["message"], value["code"])
        return value


    def handle(data, context):
        if data is None:
            return
        CALLS.append(len(data))
        return [act(row["body"]) for row in data]
"""


# --- rows -------------------------------------------------------------------------------------------------------------

ROWS = """
    def handle(data, context):
        if data is not None:
            return [repr(sorted((key, type(value).__name__, value) for key, value in row.items())) for row in data]
"""
BOUNDARY = "multipart/form-data; boundary=B"
FORM = (
    b'--B\r\nContent-Disposition: form-data; name="picture"; filename="a.jpg"\r\n\r\n\xff\xd8\r\n'
    b'--B\r\nContent-Disposition: form-data; name="options"\r\nContent-Type: application/json\r\n\r\n{"k": 1}\r\n'
    b'--B\r\nContent-Disposition: form-data; name="words"\r\nContent-Type: text/plain\r\n\r\nhi\r\n--B--\r\n'
)
FILES = FORM.replace(b'options"', b'options"; filename=""').replace(b'words"', b'words"; filename="w"')


@pytest.mark.parametrize(
    ("item", "row"),
    [
        (request(b"\xff\xd8", "image/jpeg"), [("body", bytearray(b"\xff\xd8"))]),
        (request(b""), [("body", bytearray())]),
        (request(b'{"a": [1]}', JSON), [("body", {"a": [1]})]),
        (request(b"{broken", JSON), [("body", bytearray(b"{broken"))]),
        (request("ü".encode(), "text/plain; charset=utf-8"), [("body", "ü")]),
        (request(b"a=1&b=x+y", "application/x-www-form-urlencoded"),
         [("a", bytearray(b"1")), ("b", bytearray(b"x y"))]),
        (request(FORM, BOUNDARY),
         [("options", bytearray(b'{"k": 1}')), ("picture", bytearray(b"\xff\xd8")), ("words", bytearray(b"hi"))]),
        (request(FILES, BOUNDARY), [("options", {"k": 1}), ("picture", bytearray(b"\xff\xd8")), ("words", "hi")]),
        (request(b"1", "text/csv", query="top=5&body2=%41"),
         [("body", "1"), ("body2", bytearray(b"A")), ("top", bytearray(b"5"))]),
    ],
)  # fmt: skip
def test_a_body_becomes_the_row_that_its_content_type_says(load: Load, item: Any, row: list[tuple[str, Any]]) -> None:
    (answer,) = load(ROWS).run(item)
    assert answer.body.decode() == repr([(key, type(value).__name__, value) for key, value in row])


def test_nothing_is_decoded_where_that_is_switched_off(load: Load) -> None:
    (answer,) = load(ROWS, decode_input=False).run(request(b"[1]", JSON))
    assert answer.body.decode() == repr([("body", "bytearray", bytearray(b"[1]"))])


def test_a_body_that_cannot_be_decoded_fails_alone(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    echo = load(ECHO)
    fine = request(b'"ok"', JSON)
    first, broken, last = echo.run(fine, request(b"--B\r\n", BOUNDARY), fine)
    assert (first.body, last.body) == (b"ok", b"ok")
    assert (broken.status, broken.value["type"]) == (400, "BadRequestException")

    def fail(body: bytearray, content_type: str, **_: Any) -> Any:
        raise (MemoryError if body == b"big" else AssertionError)("a defect of the decoder")

    decode_value = codec.decode_value
    monkeypatch.setattr(
        codec, "decode_value", lambda body, kind, **rest: (fail if kind == "x/y" else decode_value)(body, kind, **rest)
    )
    first, broken, big = echo.run(fine, request(b"x", "x/y"), request(b"big", "x/y"))
    assert (first.body, broken.status, big.status) == (b"ok", 503, 507)
    assert broken.detail["exception"] == "AssertionError"


def test_headers_of_each_request_are_the_clients(load: Load) -> None:
    source = """
        def handle(data, context):
            if data is not None:
                return [[context.get_request_header(i, "X-Who"), context.get_request_header(i, "body"),
                         context.get_request_id(i)] for i in range(len(data))]
    """
    answers = load(source).run(request(b"1", "text/plain", headers={"X-Who": "a"}), request(headers={"x-who": "b"}))
    assert [answer.value for answer in answers] == [
        ["a", {"content-type": "text/plain"}, "id-0"], ["b", {"content-type": ""}, "id-0"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("item", "types"),
    [
        (request(b"1"), {"body": ""}),
        (request(b"1", "application/json; charset=utf-8"), {"body": "application/json"}),
        (request(b"1", "text/plain", query="a=1&b"), {"a": "", "b": "", "body": "text/plain"}),
        (request(b"a=1", "application/x-www-form-urlencoded", query="q=2"), {"q": "", "a": ""}),
        (request(FORM, BOUNDARY), {"picture": "application/octet-stream", "options": "", "words": ""}),
        (request(FILES.replace(b"text/plain", b"text/plain; charset=utf-8"), BOUNDARY),
         {"picture": "application/octet-stream", "options": "application/json", "words": "text/plain"}),
        (request(b"1", "multipart/form-data"), {"body": "multipart/form-data"}),
        (request(b"1", "text/plain", headers={"body": "mine"}), {}),
        (request(b"12", query="a=1&b=1", flags=codec.FIELDS), {"a": "", "b": ""}),
    ],
)  # fmt: skip
def test_each_field_has_an_entry_among_the_headers(load: Load, item: Any, types: dict[str, str]) -> None:
    """As measured on TorchServe 0.12: also a field that came without a content type, and never its parameters."""
    source = """
        def handle(data, context):
            if data is not None:
                headers = context.get_all_request_header(0)
                return [{name: value["content-type"] for name, value in headers.items() if isinstance(value, dict)}]
    """
    (answer,) = load(source).run(item)
    assert answer.value == types


# --- shape ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "message", "said"),
    [
        ("[1]", "number of batch response mismatched", "returned 1 for 3"),
        ("[1] * 4", "number of batch response mismatched", "returned 4 for 3"),
        ("{'a': 1}", "Invalid model predict output", "returned dict for 3"),
        ("None", "Invalid model predict output", "returned None for 3"),
        ("(1, 2, 3)", "Invalid model predict output", "returned tuple for 3"),
        ("Hostile()", "Prediction failed", "looked at"),
    ],
)
def test_a_wrong_shape_fails_the_batch_without_another_call(load: Load, returned: str, message: str, said: str) -> None:
    source = f"""
        import numpy
        CALLS = []

        class Hostile:
            def __getattr__(self, name):
                raise KeyboardInterrupt("do not have me looked at")


        @numpy.errstate(
            all="raise",
        )
        def handle(data, context):
            if data is not None:
                CALLS.append(len(data))
                return {returned}
    """
    wrong = load(source)
    answers = wrong.ask(1, 2, 3)
    assert wrong.module.CALLS == [3]
    for answer in answers:
        assert (answer.status, answer.value["message"]) == (503, message)
        assert said in answer.detail["text"]
        assert answer.detail["where"] in {"handler.py:12 in handle", "handler.py:6 in __getattr__"}
    assert len(wrong.failures) == 1
    assert wrong.failures[0][0] == ["r0", "r1", "r2"]


# --- what the handler raises ------------------------------------------------------------------------------------------


def test_a_batch_that_raises_is_called_again_item_by_item_once(load: Load) -> None:
    acts = load(ACTS)
    answers = acts.ask("a", "raise value", "c")
    assert acts.module.CALLS == [3, 1, 1, 1]
    assert [answer.body for answer in answers if not answer.is_error] == [b"a", b"c"]
    assert answers[1].detail == {
        "exception": "ValueError", "text": "by the handler", "where": "handler.py:12 in act"
    }  # fmt: skip
    assert [ids for ids, _ in acts.failures] == [["r1"]]


def test_whatever_is_answered_leaves_before_a_request_is_called_again(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts = load(ACTS)
    begun: list[tuple[int, list[tuple[Any, ...]]]] = []

    def begin_alone(ticket: int, answers: list[Any]) -> bool:
        begun.append((ticket, list(answers)))
        return True

    monkeypatch.setattr(acts.invoker._parts, "begin_alone", begin_alone)
    items = [request(body, kind) for body, kind in [(b'"a"', JSON), (b"--B\r\n", BOUNDARY), (b'"raise value"', JSON)]]
    items = [(ticket, *rest) for ticket, (_, *rest) in zip((7, 8, 9), items, strict=True)]
    last = acts.invoker.run(items)
    assert [(ticket, [answer[:3] for answer in answers]) for ticket, answers in begun] == [
        (7, [(8, ERROR, 400)]),
        (9, [(7, ANSWER, 200)]),
    ]
    assert [answer[:4] for answer in last] == [(9, ERROR, 503, RAN_TWICE)] and acts.invoker.sent == {7, 8}
    assert acts.invoker.has_answered
    assert [answer[1] for answer in acts.invoker.run(items[1:2])] == [ERROR]
    assert not acts.invoker.has_answered and not acts.invoker.sent


def test_nothing_is_called_again_where_that_is_switched_off(load: Load) -> None:
    acts = load(ACTS, isolate_errors=False)
    assert [answer.status for answer in acts.ask("a", "raise value")] == [503, 503]
    assert acts.module.CALLS == [2]


def test_a_second_call_finds_the_rows_as_they_came(load: Load) -> None:
    source = """
        def handle(data, context):
            values = [row.pop("body") for row in data or ()]
            if len(values) > 1:
                context.set_all_response_status(500, "first")
                raise ValueError("batch")
            return [[value, sorted(row)] for value, row in zip(values, data or ())]
    """
    answers = load(source).run(request(b"[1]", JSON), request(b"2", JSON, query="top=5"))
    assert [(answer.status, answer.value) for answer in answers] == [(200, [[1], []]), (200, [2, ["top"]])]


@pytest.mark.parametrize("word", ["keyboard", "exit", "generator", "cancelled"])
def test_no_exception_of_any_kind_ends_the_worker(load: Load, word: str) -> None:
    acts = load(ACTS)
    first, guilty = acts.ask("a", f"raise {word}")
    assert first.body == b"a"
    assert (guilty.status, guilty.detail["where"]) == (503, "handler.py:12 in act")
    assert acts.ask("b")[0].body == b"b"


def test_a_call_that_was_interrupted_is_not_made_again(load: Load) -> None:
    acts = load(ACTS)
    assert [answer.status for answer in acts.ask("a", "timeout")] == [504, 504]
    assert acts.module.CALLS == [2]


def test_when_memory_runs_out_halves_are_tried(load: Load) -> None:
    acts = load(ACTS)
    answers = acts.ask("a", "b", "c", "raise memory")
    assert acts.module.CALLS == [4, 2, 2, 1, 1]
    assert [answer.status for answer in answers] == [200, 200, 200, 507]
    assert answers[3].value["message"] == "Out of resources"


@pytest.mark.parametrize(
    ("code", "status"), [(404, 404), ("422", 422), (200, 200), (1000, 500), ("many", 500), (None, 500)]
)
def test_a_prediction_exception_chooses_the_status(load: Load, code: object, status: int) -> None:
    acts = load(ACTS)
    first, guilty = acts.ask("a", {"code": code, "message": "no such thing"})
    assert first.body == b"a"
    assert (guilty.is_error, guilty.status, guilty.value["message"]) == (True, status, "no such thing")


def test_what_a_handler_means_to_refuse_is_not_logged(load: Load) -> None:
    acts = load(ACTS)
    acts.ask({"code": 404, "message": "no such thing"})
    assert acts.failures == []


def test_an_exception_that_cannot_be_looked_at_is_answered_too(load: Load) -> None:
    source = """
        class Worst(Exception):
            @property
            def message(self):
                raise KeyboardInterrupt

            def __str__(self):
                raise SystemExit

        class PredictionException(Worst):
            error_code = 400

        class Wrong:
            def initialize(self, context): pass
            def handle(self, data, context):
                raise Worst() if data[0]["body"] == 1 else PredictionException()
    """
    worst = load(source, handler="handler.py:Wrong")
    (answer,) = worst.ask(1)
    assert (answer.status, answer.detail["exception"]) == (503, "Worst")
    assert answer.detail["where"] == "handler.py:15 in handle"
    (answer,) = worst.ask(2)
    assert (answer.status, answer.detail["exception"]) == (503, "PredictionException")


# --- what comes back --------------------------------------------------------------------------------------------------


def test_status_headers_and_content_type_are_each_items_own(load: Load) -> None:
    source = """
        def handle(data, context):
            if data is None:
                return
            context.set_response_status(201, "Made", idx=0)
            context.set_response_content_type(1, "text/html")
            context.set_response_header(1, "X-Row", "grün")
            return ["a", "b", "c"]
    """
    first, second, third = load(source).ask(1, 2, 3)
    assert (first.status, first.reason, first.headers) == (201, "Made", {})
    assert (second.status, second.headers) == (200, {"content-type": "text/html", "X-Row": "grün"})
    assert (third.status, third.reason, third.headers, third.kind) == (200, "", {}, ANSWER)


@pytest.mark.parametrize(
    ("status", "phrase", "size", "said"),
    [
        ("204", "", 1, "response status '204'; use an int from 200 to 599"),
        (200.0, "", 1, "response status 200.0"),
        (70_000, "", 1, "response status 70000"),
        (100, "", 1, "response status 100"),
        (200, "", 1 << 20, "1048576 are allowed"),
    ],
)
def test_a_head_that_cannot_be_sent_costs_its_own_item_and_not_the_worker(
    load: Load, status: object, phrase: str, size: int, said: str
) -> None:
    source = f"""
        def handle(data, context):
            if data is None:
                return
            context.set_response_status({status!r}, {phrase!r}, idx=1)
            context.set_response_header(1, "x-long", "x" * {size})
            return ["a", "b"]
    """
    fine, wrong = load(source).ask(1, 2)
    assert fine.body == b"a"
    assert wrong.is_error and wrong.status == 503
    assert said in wrong.value["message"]


def test_an_element_that_cannot_be_encoded_fails_alone_and_names_its_place(load: Load) -> None:
    source = """
        class Odd:
            def tolist(self):
                raise KeyboardInterrupt("while it was encoded")

        class Handler:
            def initialize(self, context): pass
            def handle(self, data, context):
                return ["fine", {"boxes": [{1, 2}]}, [Odd()], "\\ud800", {"n": 1}]
    """
    answers = load(source, handler="handler.py:Handler").ask(*range(5))
    assert [answer.status for answer in answers] == [200, 503, 503, 503, 200]
    assert answers[1].value["message"] == "Unsupported model output data type."
    assert answers[1].detail["text"] == (
        "element 1 of the result: a <class 'set'> at [\"boxes\"][0] cannot become JSON; convert it with sorted(value)"
    )
    assert answers[1].detail["where"] == "handler.py:7 in handle"
    assert answers[2].detail["exception"] == "KeyboardInterrupt"
    assert answers[3].detail["text"].startswith("element 3 of the result: a str cannot become UTF-8")


def test_memory_that_runs_out_while_a_result_is_encoded_is_told_as_that(load: Load) -> None:
    source = """
        class Huge:
            def tolist(self):
                raise MemoryError

        def handle(data, context):
            return [[Huge()] for row in data or ()]
    """
    assert [answer.status for answer in load(source).ask(1)] == [507]


def test_nan_is_null_and_said_once(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    source = "def handle(data, context):\n    return [{'p': [float('nan'), 1.0]} for row in data or ()]"
    caplog.set_level(logging.WARNING)
    nan = load(source)
    assert [answer.value for answer in nan.ask(1, 2)] == [{"p": [None, 1.0]}] * 2
    (warning,) = warnings_in(caplog)
    assert "handler.py:1 in handle" in warning and "null" in warning
    strict = load(source, nan_as_null=False)
    assert math.isnan(strict.ask(1)[0].value["p"][0])
    assert len(warnings_in(caplog)) == 1


def test_an_answer_above_the_limit_says_so(load: Load) -> None:
    limited = load(ECHO, max_response_size=8)
    fits, too_large = limited.ask("x" * 8, "x" * 9)
    assert fits.body == b"x" * 8
    assert too_large.status == 503
    assert "9 bytes, more than max_response_size=8" in too_large.value["message"]
    assert too_large.detail["where"] == "handler.py:1 in handle"


def test_an_exception_as_an_element_is_that_items_error(load: Load) -> None:
    source = "def handle(data, context):\n    return [ValueError('this one'), 'fine'][: len(data or ())]"
    guilty, fine = load(source).ask(1, 2)
    assert (guilty.status, guilty.detail["text"], fine.body) == (503, "this one", b"fine")


def test_a_picture_is_answered_as_png(load: Load) -> None:
    source = """
        from PIL import Image

        def handle(data, context):
            return [Image.new("RGB", (2, 2)) for row in data or ()]
    """
    (answer,) = load(source).ask(1)
    assert answer.body.startswith(b"\x89PNG")
    assert answer.headers == {"content-type": "image/png"}


def test_pillow_that_is_only_half_imported_is_no_matter(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", types.ModuleType("PIL.Image"))
    assert load(ECHO).ask({"a": 1})[0].value == {"a": 1}


def test_a_description_is_a_call_of_its_own(load: Load) -> None:
    source = """
        def handle(data, context):
            if data is None:
                return
            if context.get_request_header(0, "describe") == "True":
                return [{"rows": data}]
            return [len(data)] * len(data)
    """
    described = load(source)
    assert described.describe().value == {"rows": [{}]}
    answers = described.run(request(b"1", JSON), request(flags=1, headers={"describe": "True"}), request(b"2", JSON))
    assert [json.loads(answer.body) for answer in answers] == [2, {"rows": [{}]}, 2]


def test_envelopes_unwrap_and_wrap(load: Load) -> None:
    source = """
def handle(data, context):
    return [(row["data"] if isinstance(row, dict) else row) * 2 for row in data or ()]
"""
    kserve = load(source, envelope="kserve")
    answers = kserve.ask({"instances": [1, 2]}, {"instances": [{"data": 3}]})
    assert [answer.value for answer in answers] == [{"predictions": [2, 4]}, {"predictions": [6]}]
    fine, refused = kserve.ask({"instances": [1]}, {"rows": [1]})
    assert (fine.value, refused.status) == ({"predictions": [2]}, 400)
    assert "instances" in refused.value["message"]


@pytest.mark.parametrize(
    ("is_strict", "status", "kind"), [(False, 400, "BadRequestException"), (True, 503, "InternalServerException")]
)
def test_strict_mode_answers_unusable_input_as_any_exception(
    load: Load, is_strict: bool, status: int, kind: str
) -> None:
    source = """
        from ts.torch_handler.base_handler import BaseHandler

        class Handler(BaseHandler):
            def initialize(self, context):
                self.initialized = True

            def inference(self, data):
                return data
    """
    fine, refused = (load(source, lenient=is_strict).ask(body)[0] for body in ([1.0], "word"))
    assert fine.value == [1.0]
    assert (refused.status, refused.value["type"]) == (status, kind)
    assert (refused.value["message"] == "Prediction failed") is is_strict
