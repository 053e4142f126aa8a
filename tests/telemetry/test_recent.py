"""The last errors and lines that are kept for the console: which, in what order, and how many at most."""

from __future__ import annotations

import logging
from itertools import count

from pyserve.errors import BadRequestError, HandlerError
from pyserve.log import about
from pyserve.request.messages import Request
from pyserve.telemetry import recent
from pyserve.telemetry.recent import RecentErrors, RecentLog


def record(text: str, level: int = logging.INFO, **extra: str) -> logging.LogRecord:
    made = logging.LogRecord("pyserve.some", level, "", 0, text, (), None)
    made.__dict__.update(extra)
    return made


def request(path: str = "/predictions/m") -> Request:
    return Request("POST", path, id="an-id")


def test_errors_are_told_newest_first_and_by_model() -> None:
    errors = RecentErrors(clock=count().__next__)
    errors.note(BadRequestError("first"), request(), model="m", version="1.0")
    errors.note(HandlerError("second", detail={"text": "why", "list": [1]}), request(), model="n", version="2.0")
    second, first = errors.newest()
    assert (first.message, first.status, first.request_id) == ("first", 400, "an-id")
    assert (second.message, second.status, second.detail) == ("second", 503, {"text": "why"})
    assert [each.message for each in errors.newest("m")] == ["first"]


def test_clients_that_ask_wrongly_do_not_crowd_out_errors_of_models() -> None:
    errors = RecentErrors()
    errors.note(HandlerError("the model's"), request())
    for _ in range(3 * recent.ERRORS_MAX):
        errors.note(BadRequestError("a client's"), request())
    assert len(errors.newest()) == recent.ERRORS_MAX + 1
    assert "the model's" in {each.message for each in errors.newest()}


def test_texts_of_errors_are_cut_and_the_consoles_own_are_not_kept() -> None:
    errors = RecentErrors()
    errors.note(BadRequestError("x" * 100_000, detail={"text": "y" * 100_000}), request("/" + "z" * 100_000))
    errors.note(BadRequestError("own"), request("/console/state"))
    [kept] = errors.newest()
    assert max(len(kept.message), len(kept.detail["text"]), len(kept.path)) == recent.DETAIL_SIZE_MAX


def test_lines_are_kept_for_each_model_in_order() -> None:
    log = RecentLog()
    log.emit(record("one", **about(model="m", worker="W-9000-m_1.0"), stream="stdout"))
    log.emit(record("two", **about(model="n")))
    log.emit(record("three", logging.ERROR, **about(model="m", request_id="a, b")))
    one, three = log.lines("m")
    assert (one.text, one.source, one.level) == ("one", "W-9000-m_1.0 stdout", "INFO")
    assert (three.text, three.source, three.request_ids) == ("three", "pyserve.some", "a, b")
    assert log.lines("unknown") == []


def test_of_the_server_only_what_it_warns_of_is_kept() -> None:
    log = RecentLog()
    log.emit(record("usual"))
    log.emit(record("unusual", logging.WARNING))
    assert [each.text for each in log.lines()] == ["unusual"]


def test_what_was_logged_of_a_request_is_found_with_its_traceback() -> None:
    log = RecentLog()
    try:
        raise ValueError("why")
    except ValueError as error:
        failed = record("failed", logging.ERROR, **about(model="m", request_id="a, ab"))
        failed.exc_info = (type(error), error, error.__traceback__)
        log.emit(failed)
    log.emit(record("another", **about(model="m", request_id="b")))
    assert log.about_request("m", "ab").startswith("failed\nTraceback") and "ValueError: why" in log.about_request(
        "m", "ab"
    )
    assert log.about_request("m", "b") == "another"
    assert log.about_request("m", "") == log.about_request("other", "a") == ""


def test_lines_have_bounds_of_number_size_and_models() -> None:
    log = RecentLog()
    for number in range(recent.LINES_MAX + 50):
        log.emit(record(str(number), **about(model="m")))
    assert [each.text for each in log.lines("m")] == [str(number) for number in range(50, recent.LINES_MAX + 50)]
    for _ in range(100):
        log.emit(record("x" * 1_000_000, **about(model="large")))
    assert sum(len(each.text) for each in log.lines("large")) <= recent.LINES_SIZE_MAX
    for _ in range(recent.LINES_MAX):
        log.emit(record("x", **about(model="batched", request_id=", ".join(["i" * 100] * 64))))
    assert sum(len(each.request_ids) for each in log.lines("batched")) <= recent.LINES_SIZE_MAX
    log.emit(record("kept", logging.WARNING))
    for number in range(3 * recent.MODELS_MAX):
        log.emit(record("text", **about(model=f"model {number}")))
    kept = [number for number in range(3 * recent.MODELS_MAX) if log.lines(f"model {number}")]
    assert (
        kept == list(range(3 * recent.MODELS_MAX - len(kept), 3 * recent.MODELS_MAX)) and len(kept) < recent.MODELS_MAX
    )
    assert [each.text for each in log.lines()] == ["kept"]


def test_a_record_that_cannot_be_formatted_is_left_out() -> None:
    log = RecentLog()
    log.emit(logging.LogRecord("a", logging.ERROR, "", 0, "%d", ("text",), None))
    assert log.lines() == []
