"""One context for a handler's whole life, as TorchServe has it: handlers keep it, and ask it about their requests."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from pyserve.worker.answer import CHUNK
from pyserve.worker.rehearsal import nothing_stays
from tests.support.loaded_handlers import JSON, Load, load, request
from tests.support.tried_handlers import Try, attempt

__all__ = ["attempt", "load"]

KEEPER = """
    import json
    from ts.handler_utils.utils import send_intermediate_predict_response


    class Handler:
        def initialize(self, context):
            self.context = context
            self.at_first = [context.request_ids, context.request_processor, context.cl_socket]

        def handle(self, data, context):
            assert self.context is context
            kept = self.context
            kept.calls = getattr(kept, "calls", 0) + 1
            told = [{"ids": [kept.get_request_id(i), len(kept.request_ids)], "who": kept.get_request_header(i, "X-Who"),
                     "status": kept.get_response_status(i), "calls": kept.calls} for i in range(len(data))]
            for i, row in enumerate(data):
                order = row.get("body")
                if order == "refuse":
                    kept.set_response_status(422, "Unprocessable", i)
                    kept.set_response_header(i, "X-Why", "asked to")
                if order == "all":
                    kept.set_all_response_status(418, "teapot")
                if order == "stream":
                    send_intermediate_predict_response(["part"] * len(data), kept.request_ids, "", 200, kept)
                if order == "fail" and len(data) > 1:
                    kept.set_all_response_status(400, "left behind")
                    raise ValueError("a batch")
            return told
"""


def test_the_kept_context_is_the_one_and_is_about_the_requests_at_hand(load: Load) -> None:
    loaded = load(KEEPER)
    assert loaded.entry.handler.at_first == [None, None, None]
    assert loaded.entry.handler.context is loaded.context
    (first,) = loaded.run(request(b"1", JSON, id="a", headers={"X-Who": "one"}))
    assert first.value == {"ids": ["a", 1], "who": "one", "status": [200, None], "calls": 1}
    second, third = loaded.run(
        request(b"1", JSON, id="b", headers={"X-Who": "two"}), request(b"1", JSON, id="c", headers={"X-Who": "three"})
    )
    assert second.value == {"ids": ["b", 2], "who": "two", "status": [200, None], "calls": 2}
    assert third.value["who"] == "three"
    assert loaded.context.metrics.request_ids == {0: "b", 1: "c"}


def test_what_is_set_on_the_kept_context_is_answered_and_gone_for_the_next_call(load: Load) -> None:
    loaded = load(KEEPER)
    refused, served = loaded.ask("refuse", 1)
    assert (refused.status, refused.reason, refused.headers) == (422, "Unprocessable", {"X-Why": "asked to"})
    assert (served.status, served.headers) == (200, {})
    assert [answer.status for answer in loaded.ask("all", 1)] == [418, 418]
    (after,) = loaded.ask(1)
    assert (after.status, after.reason, after.headers, after.value["status"]) == (200, "", {}, [200, None])
    assert after.value["calls"] == 3


def test_parts_go_to_the_kept_contexts_clients_while_the_call_runs_only(load: Load) -> None:
    loaded = load(KEEPER)
    loaded.ask("stream", "stream")
    assert [answer[:2] for answer in loaded.parts.sent] == [(0, CHUNK), (1, CHUNK)] * 2
    with pytest.raises(ValueError, match="while it runs"):
        loaded.module.send_intermediate_predict_response(["late"], {}, "", 200, loaded.context)
    assert not loaded.context.cancelled and not loaded.context.is_cancelled(0)
    assert loaded.context.get_request_id(1) == "r1", "it can still be asked about the last batch"


def test_a_batch_that_fails_leaves_nothing_to_the_calls_for_its_items(load: Load) -> None:
    answers = load(KEEPER).ask("fail", 1)
    assert [(answer.status, answer.reason) for answer in answers] == [(200, "")] * 2
    assert [answer.value["ids"] for answer in answers] == [["r0", 1], ["r1", 1]]


def test_a_description_is_asked_of_the_same_context(load: Load) -> None:
    loaded = load(KEEPER)
    loaded.ask(1)
    assert loaded.describe().value["calls"] == 2
    assert loaded.context.get_request_header(0, "describe") == "True"


def test_before_the_first_call_the_context_says_that_there_is_no_request(load: Load) -> None:
    source = """
        class Handler:
            def initialize(self, context):
                context.set_response_status(400, "ignored, as by TorchServe")
                self.id = context.get_request_id()
                self.told = []
                for ask in (lambda: context.get_request_header(0, "a"), lambda: context.set_all_response_status(400),
                            lambda: context.set_response_header(0, "a", "b"), lambda: context.get_response_status(0)):
                    try:
                        ask()
                    except TypeError as error:
                        self.told.append(str(error))

            def handle(self, data, context):
                return ["ok"] * len(data)
    """
    loaded = load(source)
    handler = loaded.entry.handler
    assert handler.id is None
    assert len(handler.told) == 4 and all("has no request here" in text for text in handler.told)
    assert loaded.ask(1)[0].status == 200


def test_a_context_can_be_copied_while_a_call_runs(load: Load) -> None:
    source = """
        import copy, pickle

        class Handler:
            def initialize(self, context):
                context.cache = {}

            def handle(self, data, context):
                self.copies = [copy.copy(context), copy.deepcopy(context), pickle.loads(pickle.dumps(context))]
                context.cache["a"] = 1
                return ["ok"] * len(data)
    """
    loaded = load(source)
    assert loaded.run(request(b"1", JSON, headers={"X-Who": "me"}, id="a"))[0].status == 200
    shallow, deep, pickled = loaded.entry.handler.copies
    assert shallow.cache == {"a": 1} and deep.cache == {} and pickled.cache == {}
    for each in (deep, pickled):
        assert (each.get_request_id(0), each.get_request_header(0, "X-Who"), each.cl_socket) == ("a", "me", None)
    assert copy.deepcopy(loaded.context).model_name == pickle.loads(pickle.dumps(loaded.context)).model_name == "m"


def test_criteria_are_not_asked_without_continuous_batching(load: Load) -> None:
    source = """
        class Handler:
            def initialize(self, context):
                pass

            def handle(self, data, context):
                context.stopping_criteria = [lambda part: False, None, 5]
                return ["ok"] * len(data)
    """
    loaded = load(source)
    assert [answer.body for answer in loaded.ask(1, 2)] == [b"ok"] * 2
    assert loaded.parts.sent == []


# --- nothing of a rehearsal stays -------------------------------------------------------------------------------------

COUNTING = """
    class Handler:
        def initialize(self, context):
            self.context = context
            context.seen = []

        def handle(self, data, context):
            context.calls = getattr(context, "calls", 0) + 1
            context.seen += [row["body"] for row in data]
            context.set_all_response_status(400)
            {also}
            return [context.calls] * len(data)
"""


@pytest.mark.parametrize(
    ("also", "calls", "seen"),
    [("pass", None, []), ("self.is_ready = True", 1, ["hello"])],  # it may count on both, or on none
)
def test_a_rehearsal_leaves_the_context_as_initialize_did(
    attempt: Try, also: str, calls: int | None, seen: list[str]
) -> None:
    files = {"handler.py": COUNTING.replace("{also}", also), "sample_input.txt": "hello"}
    context: Any = attempt("handler.py", files, config={}).context
    assert context.request_ids is None and context.request_processor is None
    assert (getattr(context, "calls", None), context.seen) == (calls, seen)


def test_what_a_trial_changes_of_the_contexts_containers_is_undone(load: Load) -> None:
    loaded = load(KEEPER)
    context: Any = loaded.context
    context.cache, context.list, context.set = {"a": 1}, [1], {1}
    kept = context.cache, context.list, context.set
    with nothing_stays(loaded.entry, context):
        context.cache["b"] = 2
        context.list.append(2)
        context.set = {3}
        context.new = 1
    assert (context.cache, context.list, context.set) == ({"a": 1}, [1], {1})
    assert all(now is before for now, before in zip((context.cache, context.list, context.set), kept, strict=True))
    assert not hasattr(context, "new")
