"""The context of a handler in the server's threads: one object, which each thread asks about its own requests."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from pyserve.context import Batch, Context, ThreadContext
from pyserve.http1.answer import AnswerWriter
from pyserve.request.messages import Request, Response
from tests.support.lane_stand import JSON_HEADERS, Probe, Stand, error, run, standing
from tests.support.networks import Identity


class Keeper(Probe):
    """Keeps the context, and asks it about requests in both of its stages."""

    def prepare(self, context: Context) -> None:
        super().prepare(context)
        self.kept = context
        self.barrier: threading.Barrier | None = None
        self.left: list[Any] = []

    def preprocess(self, data: Any) -> Any:
        who = self.kept.get_request_header(0, "X-Who")
        if self.barrier is not None:
            self.barrier.wait(60)  # others' are in their preprocess now
        assert self.kept.get_request_header(0, "X-Who") == who and self.kept.get_request_id() == who
        self.kept.set_response_header(0, "X-Preprocessed", str(who))
        if who == "refused":
            self.kept.set_response_status(422, "Refused", 0)
        return super().preprocess(data)

    def postprocess(self, data: Any) -> list[Any]:
        assert self.context is self.kept
        count = len(self.kept.request_processor)
        for index in range(count):
            self.kept.set_response_header(index, "X-Postprocessed", str(self.kept.get_request_header(index, "X-Who")))
        return ["done"] * count


def ask(stand: Stand, who: str) -> Any:
    return stand.post(1.0, id=who, headers=[*JSON_HEADERS, ("X-Who", who)])


@pytest.mark.parametrize("is_fast", [True, False], ids=["on the loop", "in the pool"])
def test_each_stage_asks_about_its_own_request_and_what_it_sets_is_answered(tmp_path: Path, is_fast: bool) -> None:
    async def test() -> None:
        handler = Keeper()
        async with standing(tmp_path, Identity(), batch_size=4, handler=handler) as stand:
            handler.is_fast = is_fast
            handler.barrier = None if is_fast else threading.Barrier(2)  # as many as the pool has threads
            names = ["a", "b", "c", "refused"]
            exchanges = [ask(stand, name) for name in names]
            await stand.until(lambda: all(exchange.answered for exchange in exchanges))
            for name in names:
                answer = stand.answers[name]
                assert answer.headers == {"X-Preprocessed": name, "X-Postprocessed": name}, name
                assert (answer.status, answer.reason) == ((422, "Refused") if name == "refused" else (200, ""))
            assert handler.kept.request_ids is None, "nothing stays"

    run(test())


def test_a_request_that_begins_while_others_are_answered_does_not_change_whom_they_are_for(tmp_path: Path) -> None:
    async def test() -> None:
        handler = Keeper()
        async with standing(tmp_path, Identity(), batch_size=2, min_batch=2, max_batch_delay_ms=200, handler=handler) \
                as stand:  # fmt: skip
            handler.is_fast = True
            answer = stand.lane.answer
            later: list[Any] = []

            def answer_and_begin(owner: Any, response: Response) -> None:
                answer(owner, response)
                if not later:
                    later.append(ask(stand, "later"))

            stand.lane.answer = answer_and_begin  # type: ignore[method-assign]
            exchanges = [ask(stand, name) for name in ("a", "b")]
            await stand.until(lambda: all(each.answered for each in (*exchanges, *later)) and bool(later))
            for name in ("a", "b", "later"):
                assert stand.answers[name].headers == {"X-Preprocessed": name, "X-Postprocessed": name}

    run(test())


def test_a_header_that_cannot_be_sent_is_the_handlers_failure(tmp_path: Path) -> None:
    async def test() -> None:
        class Odd(Probe):
            def postprocess(self, data: Any) -> list[Any]:
                assert self.context is not None
                self.context.get_response_headers(0)["X A"] = "v"
                return ["done"]

        async with standing(tmp_path, Identity(), handler=Odd()) as stand:
            answer = await stand.answer(1.0)
            assert answer.status == 503
            assert "'X A' is no name of a response header" in error(answer)["detail"]["text"]

    run(test())


def test_what_latin_1_lacks_and_a_phrase_of_two_lines_can_be_sent(tmp_path: Path) -> None:
    async def test() -> None:
        class Odd(Probe):
            def postprocess(self, data: Any) -> list[Any]:
                assert self.context is not None
                self.context.set_response_header(0, "X-City", "München 東京")
                self.context.set_response_status(404, "not\r\nfound \0 東", 0)
                return ["done"]

        async with standing(tmp_path, Identity(), handler=Odd()) as stand:
            answer = await stand.answer(1.0)
            assert (answer.status, answer.reason) == (404, "not  found   ?")
            assert answer.headers == {"X-City": "München ??"}
            request = Request("GET", "/", headers=[], body=b"", id="i", arrived_at=0)
            assert AnswerWriter().encode(answer, request, True)[0].startswith(b"HTTP/1.1 404 not  found   ?\r\n")

    run(test())


def test_threads_see_their_own_batch_and_a_copy_is_anybodys() -> None:
    context = ThreadContext("m", "folder")
    context.note = "shared"  # type: ignore[attr-defined]
    context.bind(Batch(["mine"], [[]]))
    copy = context.for_batch(["copied"], [[]])
    seen: list[Any] = []

    def look() -> None:
        seen.append((context.request_ids, context.note, copy.get_request_id()))  # type: ignore[attr-defined]
        context.bind(Batch(["theirs"], [[]]))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [(None, "shared", "copied")]
    assert context.request_ids == {0: "mine"}
