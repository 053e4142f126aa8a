"""Answers in parts: generators, TorchServe's function, clients that go, and calls that are interrupted."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator

import pytest

from pyserve.launch import INTERRUPT
from pyserve.worker.answer import ANSWER, ERROR, LAST
from pyserve.worker.main import _let_calls_be_interrupted
from tests.support.loaded_handlers import CHUNK, JSON, Load, Loaded, Told, load, request

__all__ = ["load"]

LISTS = """
    CLOSED = []

    def handle(data, context):
        if data is not None:
            return parts(data, context)

    def parts(data, context):
        try:
            context.set_response_content_type(0, "text/event-stream")
            yield ["a"] * len(data)
            yield [{"p": float("nan")}] * len(data)
            yield ["end"] * len(data)
        finally:
            CLOSED.append(context.cancelled)
"""
ELEMENTS = """
    import os
    import signal
    import time

    def handle(data, context):
        if data is not None:
            return [stream(row["body"]) if isinstance(row["body"], list) else row["body"] for row in data]

    def stream(parts):
        for part in parts:
            if part == "raise":
                raise KeyboardInterrupt("in a generator")
            if part == "endless":
                end = time.monotonic() + 20
                while time.monotonic() < end:
                    os.kill(os.getpid(), signal.SIGRTMIN + 7)
            yield {1, 2} if part == "set" else part
"""


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Puts the handler of INTERRUPT back."""
    before = signal.getsignal(INTERRUPT)
    yield
    signal.signal(INTERRUPT, before)


def test_what_a_generator_yields_is_sent_at_once_and_the_last_part_is_the_answer(load: Load) -> None:
    lists = load(LISTS)
    order: list[int] = []
    lists.parts.on_send = lambda answer: order.append(answer[0])
    first, second = lists.ask(1, 2)
    assert order == [0, 1, 0, 1]
    assert lists.parts.bodies(0) == lists.parts.bodies(1) == [b"a", b'{\n  "p": null\n}']
    assert (first.kind, first.body, second.kind, second.body) == (LAST, b"end", LAST, b"end")
    head, later = (Told.of(answer) for answer in lists.parts.sent if answer[0] == 0)
    assert (head.kind, head.status) == (CHUNK, 200)
    assert head.headers == {"content-type": "text/event-stream", "ts_stream_next": "true"}
    assert later.headers == {}


def test_a_generator_is_closed_when_all_clients_have_gone_and_not_before(load: Load) -> None:
    lists = load(LISTS)
    lists.parts.gone = {1}
    lists.ask(1, 2)
    assert lists.parts.bodies(0)[0] == b"a" and lists.parts.bodies(1) == []
    assert lists.module.CLOSED == [False]
    lists.parts.sent.clear()
    lists.parts.on_send = lambda answer: lists.parts.gone.add(answer[0])
    lists.parts.gone = set()
    assert len(lists.ask(1, 2)) == 2
    assert len(lists.parts.bodies(0)) == 1
    assert lists.module.CLOSED == [False, True]


@pytest.mark.parametrize(
    ("parts", "count", "what"),
    [("[['a'], ['b']]", 2, "returned 1 for 2"), ("['a', 'b']", 2, "returned 1 for 2"), ("['a', ['b']]", 1, "")],
)
def test_parts_of_a_generator_are_one_per_request(load: Load, parts: str, count: int, what: str) -> None:
    source = f"""
        def handle(data, context):
            return iterate() if data is not None else None

        def iterate():
            yield from {parts}
    """
    answers = load(source).ask(*range(count))
    if what:
        assert [answer.detail["text"] for answer in answers] == [f"the handler {what}"] * count
    else:
        assert answers[0].body == b"b"


def test_an_empty_generator_is_an_empty_answer(load: Load) -> None:
    source = "def handle(data, context):\n    return (x for x in ()) if data is not None else None"
    assert [(each.kind, each.body) for each in load(source).ask(1, 2)] == [(ANSWER, b"")] * 2


def test_each_element_may_be_a_generator_of_its_own(load: Load) -> None:
    elements = load(ELEMENTS)
    plain, one, many, broken, odd = elements.ask(
        "plain", ["x"], ["x", "y", "z"], ["x", "y", "raise"], ["x", "set", "y"]
    )
    assert (plain.kind, plain.body) == (ANSWER, b"plain")
    assert (one.kind, one.body, elements.parts.bodies(1)) == (ANSWER, b"x", [])
    assert (many.kind, many.body, elements.parts.bodies(2)) == (LAST, b"z", [b"x", b"y"])
    assert (broken.kind, broken.detail["where"]) == (ERROR, "handler.py:12 in stream")
    assert broken.detail["exception"] == "KeyboardInterrupt"
    assert odd.detail["text"].startswith("element 4 of the result: a <class 'set'> cannot become JSON")
    assert odd.detail["where"] == "handler.py:5 in handle"


@pytest.mark.usefixtures("interruptible")
def test_an_endless_element_is_interrupted_and_only_it(load: Load) -> None:
    elements = load(ELEMENTS)
    _let_calls_be_interrupted(elements.invoker)
    first, endless, last = elements.ask(["a", "b"], ["c", "endless"], "plain")
    assert (first.body, last.body) == (b"b", b"plain")
    assert (endless.status, endless.detail["exception"]) == (504, "HandlerTimeout")
    assert endless.detail["where"] in {"handler.py:15 in stream", "handler.py:16 in stream"}
    assert not elements.invoker.is_calling
    signal.raise_signal(INTERRUPT)  # between two calls it does nothing
    assert elements.ask("again")[0].body == b"again"


COROUTINE = """
    import asyncio
    import os
    import signal
    import threading

    DONE = threading.Event()
    CANCELLED = []

    def interrupt():
        while not DONE.wait(0.01):
            os.kill(os.getpid(), signal.SIGRTMIN + 7)

    THREAD = threading.Thread(target=interrupt, daemon=True)

    class Handler:
        def initialize(self, context): pass

        async def handle(self, data, context):
            if data[0]["body"] == "endless":
                THREAD.start()
                try:
                    await asyncio.sleep(20)
                except asyncio.CancelledError:
                    CANCELLED.append(True)
                    raise
            return [row["body"] for row in data]
"""


@pytest.mark.usefixtures("interruptible")
def test_a_coroutine_that_was_interrupted_does_not_go_on_in_the_next_call(load: Load) -> None:
    coroutine = load(COROUTINE)
    _let_calls_be_interrupted(coroutine.invoker)
    (interrupted,) = coroutine.ask("endless")
    coroutine.module.DONE.set()
    coroutine.module.THREAD.join()  # no signal comes later
    assert (interrupted.status, interrupted.detail["exception"]) == (504, "HandlerTimeout")
    assert asyncio.all_tasks(coroutine.entry.loop) == set()
    assert coroutine.module.CANCELLED == [True]
    assert coroutine.ask("next")[0].body == b"next"


def test_coroutines_are_awaited_and_may_be_cancelled(load: Load) -> None:
    source = """
        import asyncio

        async def handle(data, context):
            await asyncio.sleep(0)
            if data is not None:
                if data[0]["body"] == "cancel":
                    raise asyncio.CancelledError
                return [row["body"] for row in data]
    """
    coroutine = load(source)
    assert coroutine.entry.is_coroutine
    assert coroutine.ask("a")[0].body == b"a"
    cancelled = coroutine.ask("cancel")[0]
    assert (cancelled.status, cancelled.detail["exception"]) == (503, "CancelledError")
    assert coroutine.ask("b")[0].body == b"b"


SENDS = """
    from ts.handler_utils.utils import send_intermediate_predict_response

    SEEN = []

    def handle(data, context):
        if data is None:
            return
        SEEN.append(context.cancelled)
        for word in ("one", {"two": 2}):
            send_intermediate_predict_response([word] * len(data), context.request_ids, "Intermediate", 200, context)
            SEEN.append(context.cancelled)
        if data[0]["body"] == "few":
            send_intermediate_predict_response(["x"], context.request_ids, "Intermediate", 200, context)
        if data[0]["body"] == "odd":
            send_intermediate_predict_response([{1}] * len(data), context.request_ids, "Intermediate", 200, context)
        return ["end"] * len(data)
"""


def test_torchserves_function_sends_parts(load: Load) -> None:
    sends = load(SENDS)
    answers = sends.ask(1, 2)
    assert [(answer.kind, answer.body) for answer in answers] == [(LAST, b"end")] * 2
    assert sends.parts.bodies(1) == [b"one", b'{\n  "two": 2\n}']
    assert sends.module.SEEN == [False] * 3


def test_the_context_tells_when_every_client_has_gone(load: Load) -> None:
    sends = load(SENDS)
    sends.parts.on_send = lambda answer: sends.parts.gone.add(answer[0])
    sends.ask(1, 2)
    assert sends.module.SEEN == [False, True, True]
    assert len(sends.parts.sent) == 2
    assert sends.context.cancelled is False


@pytest.mark.parametrize(("word", "text"), [("few", "got 1 parts for a batch of 2"), ("odd", "cannot become JSON")])
def test_a_batch_that_has_streamed_is_not_called_again(load: Load, word: str, text: str) -> None:
    sends = load(SENDS)
    answers = sends.ask(word, 2)
    assert [answer.kind for answer in answers] == [ERROR, ERROR]
    assert text in answers[0].detail["text"]
    assert len(sends.module.SEEN) == 3


def test_an_error_before_the_first_part_is_that_items_alone(load: Load) -> None:
    elements: Loaded = load(ELEMENTS)
    answers = elements.run(request(b'["raise"]', JSON), request(b'["a", "b"]', JSON))
    assert [answer.kind for answer in answers] == [ERROR, LAST]
