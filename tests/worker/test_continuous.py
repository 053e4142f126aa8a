"""Continuous batching: requests share the handler's calls, join and leave between them, and get only their own."""

from __future__ import annotations

import http.client
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pyserve.worker.continuous import _Saved
from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, LIMIT_S, SEED, Answer, Server, at_once

pytestmark = pytest.mark.server

# A language model that counts: "name:0 name:1 ...", each word with the size of the call that it came from.
COUNTER = """
import os
import time


class Counter:
    def initialize(self, context):
        self.context = context
        context.cache = {}
        self.elsewhere = {}

    def handle(self, data, context):
        assert context.request_ids == self.context.request_ids
        entries = [self.entry(context, index, row) for index, row in enumerate(data)]
        for entry in entries:
            if entry.get("fail_at") == entry["next"]:
                raise ValueError(entry["name"])
            entry["steps"] += 1
        if any(entry.get("sleep") for entry in entries):
            time.sleep(30)
        results = [self.result(context, entry, len(data)) for entry in entries]
        context.stopping_criteria = [self.criterion(entry) for entry in entries]
        if any(entry.get("criteria") == "many" for entry in entries):
            context.stopping_criteria += [None]
        if any(entry.get("short") for entry in entries):
            results.pop()
        return results

    def entry(self, context, index, row):
        id = context.get_request_id(index)
        known = self.elsewhere if id in self.elsewhere else context.cache
        if id in known:
            assert row == {}, row
            return known[id]
        order = row["body"]
        known = self.elsewhere if order.get("elsewhere") else context.cache
        known[id] = {"next": 0, "steps": 0, "words": [], **order}
        return known[id]

    def result(self, context, entry, size):
        entry["is_over"] = False
        if entry.get("fails_alone"):
            return RuntimeError("only this one")
        if entry.get("show"):
            entry["is_over"] = True
            return {"cached": len(context.cache), "pid": os.getpid()}
        if "until" in entry:
            time.sleep(0.001)
            entry["is_over"] = os.path.exists(entry["until"])
        elif not entry["next"] and size < entry.get("meet", 1):
            entry["steps"] -= 1
            return b""  # no word yet
        entry["next"] += 1
        entry["words"].append(entry["next"])
        if "count" in entry:
            entry["is_over"] = entry["next"] == entry["count"]
        assert len(entry["words"]) == entry["next"] == entry["steps"], entry
        return "%s:%d:%d " % (entry["name"], entry["next"] - 1, size)

    def criterion(self, entry):
        if entry.get("criteria") == "raises":
            return lambda result: 1 / 0
        if entry.get("criteria") == "none":
            return lambda result: None
        return lambda result: entry["is_over"]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("continuous")
    server = Server(folder)
    config = {"continuousBatching": True, "batchSize": 8}
    write_handler(server.store, "counter", COUNTER, config=config)
    write_handler(
        server.store, "slow", COUNTER, config={**config, "responseTimeout": 1, "clientTimeoutInMills": 60_000}
    )
    with server:
        server.start("--models", "all")
        yield server


def ask(server: Server, model: str = "counter", id: str = "", **order: Any) -> Answer:
    headers = {**JSON, "x-request-id": id} if id else JSON
    return server.ask("POST", f"/predictions/{model}", json.dumps(order).encode(), headers)


def asking(server: Server, **order: Any) -> Callable[[], Answer]:
    return lambda: ask(server, **order)


def words(text: bytes) -> list[tuple[str, int, int]]:
    """(name, number, size of the call) of each word."""
    split = (word.split(":") for word in text.decode().split())
    return [(name, int(number), int(size)) for name, number, size in split]


def numbers(text: bytes, name: str) -> list[int]:
    """Of the words, which all must be of ``name``."""
    assert {each[0] for each in words(text)} == {name}, text
    return [each[1] for each in words(text)]


class Stream:
    """A request that goes on until a file is there."""

    def __init__(self, server: Server, until: Path, name: str, **order: Any):
        self._until = until
        self._connection = http.client.HTTPConnection(*server.address(), timeout=LIMIT_S)
        body = json.dumps({"until": str(until), "name": name, **order}).encode()
        self._connection.request("POST", "/predictions/counter", body, JSON)
        self.response = self._connection.getresponse()
        self.text = self.response.read1()
        self.socket = self._connection.sock

    def rest(self) -> bytes:
        """All that it was sent, once it has come to its end."""
        self._until.touch()
        return self.text + self.response.read()

    def close(self) -> None:
        """Hangs up, with a reset."""
        if self.socket is not None and self.socket.fileno() >= 0:
            self.socket.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER 0
        self.response.close()
        self._connection.close()


@contextmanager
def streaming(server: Server, until: Path, name: str = "holder", **order: Any) -> Iterator[Stream]:
    """A stream whose first part has come."""
    stream = Stream(server, until, name, **order)
    try:
        yield stream
    finally:
        until.touch()
        stream.close()


def cached(server: Server) -> int:
    """How many requests have something in the cache."""
    count: int = ask(server, show=True).json["cached"]
    return count - 1  # but for the one that asks


# --- parts ------------------------------------------------------------------------------------------------------------


def test_each_client_gets_its_own_parts_in_order_from_calls_that_all_share(server: Server) -> None:
    counts = [2, 3, 5, 8, 13, 21]
    answers = at_once([asking(server, name=f"n{count}", count=count, meet=6) for count in counts])
    for count, answer in zip(counts, answers, strict=True):
        assert answer.status == 200
        assert numbers(answer.body, f"n{count}") == list(range(count))
        assert words(answer.body)[0] == (f"n{count}", 0, 6)
        assert answer.headers["ts_stream_next"] == "true" and answer.headers["transfer-encoding"] == "chunked"
    assert cached(server) == 0


def test_more_requests_than_fit_take_the_places_of_those_that_leave(server: Server, tmp_path: Path) -> None:
    print(f"PYSERVE_TEST_SEED={SEED}")
    generator = random.Random(SEED)
    counts = [generator.randint(1, 30) for _ in range(40)]
    with streaming(server, tmp_path / "end") as holder:
        answers = at_once([asking(server, name=f"r{index}", count=count) for index, count in enumerate(counts)])
        for index, (count, answer) in enumerate(zip(counts, answers, strict=True)):
            assert numbers(answer.body, f"r{index}") == list(range(count))
            assert all(2 <= size <= 8 for _, _, size in words(answer.body))
        text = holder.rest()
    assert numbers(text, "holder") == list(range(len(words(text))))
    assert {1, 8} <= {size for _, _, size in words(text)}


def test_a_request_joins_and_leaves_while_another_goes_on(server: Server, tmp_path: Path) -> None:
    with streaming(server, tmp_path / "end") as holder:
        assert words(holder.text)[0] == ("holder", 0, 1)
        answer = ask(server, name="guest", count=3)
        assert words(answer.body) == [("guest", 0, 2), ("guest", 1, 2), ("guest", 2, 2)]
        text = holder.rest()
    assert numbers(text, "holder") == list(range(len(words(text))))
    assert [size for _, _, size in words(text)].count(2) == 3


def test_one_part_is_no_stream(server: Server) -> None:
    for order in ({"count": 1}, {"count": 5, "criteria": "none"}):
        answer = ask(server, name="x", **order)
        assert answer.body == b"x:0:1 "
        assert "ts_stream_next" not in answer.headers and "transfer-encoding" not in answer.headers


def test_requests_with_the_same_id_do_not_share_what_is_in_the_cache(server: Server) -> None:
    answers = at_once([lambda name=name: ask(server, id="same", name=name, count=6, meet=2)  # type: ignore[misc]
                       for name in "ab"])  # fmt: skip
    for name, answer in zip("ab", answers, strict=True):
        assert numbers(answer.body, name) == list(range(6))
        assert answer.headers["x-request-id"] == "same"


# --- clients that go, and failures ------------------------------------------------------------------------------------


def test_a_client_that_hangs_up_leaves_the_batch_and_the_cache(server: Server, tmp_path: Path) -> None:
    with streaming(server, tmp_path / "never"), streaming(server, tmp_path / "end", "other") as other:
        assert cached(server) == 2
    with streaming(server, tmp_path / "no end") as holder, streaming(server, tmp_path / "end 2", "other") as other:
        holder.close()
        server.wait_for(lambda: cached(server) == 1, "the request to leave")
        text = other.rest()
    assert numbers(text, "other") == list(range(len(words(text))))
    server.wait_for(lambda: cached(server) == 0, "the end")


def test_a_request_that_fails_when_it_joins_costs_the_others_nothing(server: Server, tmp_path: Path) -> None:
    with streaming(server, tmp_path / "end") as holder:
        answers = at_once([asking(server, name="good", count=9), asking(server, name="bad", count=9, fail_at=0),
                           asking(server, name="fine", count=9)])  # fmt: skip
        assert [answer.status for answer in answers] == [200, 503, 200]
        assert answers[1].detail["text"] == "bad" and answers[1].detail["where"].startswith("handler.py:")
        assert numbers(answers[0].body, "good") == numbers(answers[2].body, "fine") == list(range(9))
        text = holder.rest()
    assert numbers(text, "holder") == list(range(len(words(text))))
    assert cached(server) == 0


def test_a_stream_that_fails_is_cut_off_and_the_others_miss_and_repeat_nothing(server: Server, tmp_path: Path) -> None:
    with streaming(server, tmp_path / "end") as holder:
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            ask(server, name="bad", count=9, fail_at=4)
        assert numbers(ask(server, name="next", count=3).body, "next") == [0, 1, 2]
        text = holder.rest()
    assert numbers(text, "holder") == list(range(len(words(text))))
    assert cached(server) == 0


def test_a_request_whose_state_cannot_be_put_back_fails_with_the_step(server: Server, tmp_path: Path) -> None:
    with streaming(server, tmp_path / "end", elsewhere=True) as holder:
        assert ask(server, name="bad", count=9, fail_at=0).status == 503
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            holder.response.read()


def test_an_exception_in_place_of_a_result_is_the_answer_of_its_request(server: Server) -> None:
    answers = at_once([asking(server, name="good", count=5), asking(server, name="bad", fails_alone=True)])
    assert numbers(answers[0].body, "good") == list(range(5))
    assert (answers[1].status, answers[1].detail["text"]) == (503, "only this one")


def test_criteria_that_fail_or_are_too_many_are_named(server: Server) -> None:
    answer = ask(server, name="x", count=3, criteria="raises")
    assert (answer.status, answer.detail["exception"]) == (503, "ZeroDivisionError")
    answer = ask(server, name="x", count=3, criteria="many")
    assert answer.detail["text"] == "context.stopping_criteria has 2 elements for a batch of 1"


def test_a_result_too_few_fails_the_step_in_torchserves_words(server: Server) -> None:
    answer = ask(server, name="x", count=3, short=True)
    assert (answer.status, answer.json["message"]) == (503, "number of batch response mismatched")
    assert cached(server) == 0


def test_a_step_over_response_timeout_is_ended_and_the_model_stays_loaded(server: Server) -> None:
    pid = ask(server, "slow", show=True).json["pid"]
    answer = ask(server, "slow", name="x", sleep=True)
    assert answer.status == 504
    assert ask(server, "slow", show=True).json == {"cached": 1, "pid": pid}


def test_a_worker_that_is_told_to_stop_finishes_its_streams(server: Server, tmp_path: Path) -> None:
    with streaming(server, tmp_path / "end") as holder:
        scaling = threading.Thread(
            target=server.manage, args=("PUT", "/models/counter?min_worker=0&max_worker=0&synchronous=true")
        )
        scaling.start()
        server.wait_for(lambda: ask(server, show=True).status == 503, "the worker to be stopped")
        text = holder.rest()
        scaling.join(LIMIT_S)
    assert numbers(text, "holder") == list(range(len(words(text))))
    server.manage("PUT", "/models/counter?min_worker=1&synchronous=true")
    assert ask(server, name="x", count=1).body == b"x:0:1 "


# --- what is put back before a step is tried again --------------------------------------------------------------------


def test_the_cache_gets_back_what_it_held() -> None:
    entry = {"words": [1, 2], "seen": {3}, "count": 2, "nested": {"a": 1}}
    cache: dict[str, Any] = {"x": entry, "other": 1}
    saved = _Saved(cache, "x")
    assert saved.is_whole()
    entry["words"].append(4)  # type: ignore[attr-defined]
    entry["seen"].clear()  # type: ignore[attr-defined]
    entry["nested"]["b"] = 2  # type: ignore[index]
    entry["count"] = 9
    entry["more"] = 1
    cache.pop("x")
    saved.put_back()
    assert cache == {"x": {"words": [1, 2], "seen": {3}, "count": 2, "nested": {"a": 1}}, "other": 1}
    assert cache["x"] is entry
    joined = _Saved(cache, "y")
    cache["y"] = {"half": "done"}
    joined.put_back()
    assert "y" not in cache


@pytest.mark.parametrize("entry", [None, object(), {"keys": object()}, {"a": [object()]}, {"a": {"b": [1]}}])
def test_what_a_failed_step_may_have_changed_out_of_sight_is_not_tried_again(entry: Any) -> None:
    assert not _Saved({"x": entry}, "x").is_whole()
