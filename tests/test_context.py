"""The Context that handlers see: TorchServe's members, headers by any spelling, one object for all batches."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import pytest

from pyserve.answer_head import answer_head, sent_headers
from pyserve.context import Batch, Context, RequestProcessor
from pyserve.errors import HandlerError


@pytest.fixture
def model_context() -> Context:
    return Context(
        "digits",
        "model-dir",
        {"model": {"serializedFile": "digits.pth"}},
        batch_size=4,
        gpu=None,
        mms_version="0.1",
        model_yaml_config={"handler": {"threshold": 0.5}},
    )


@pytest.fixture
def batch(model_context: Context) -> Context:
    return model_context.for_batch(
        ["id-0", "id-1"],
        [[("X-Trace", "a"), ("Accept", "*/*")], [("x-trace", "b"), ("X-TRACE", "c"), ("ts_request_sequence_id", "s7")]],
    )


def test_model_members_are_torchserves(model_context: Context) -> None:
    assert model_context.model_name == "digits"
    assert model_context.manifest == {"model": {"serializedFile": "digits.pth"}}
    assert model_context.model_yaml_config == {"handler": {"threshold": 0.5}}
    assert model_context.system_properties == {
        "model_dir": "model-dir",
        "gpu_id": None,
        "batch_size": 4,
        "server_name": "MMS",
        "server_version": "0.1",
        "limit_max_image_pixels": True,
    }
    assert model_context.metrics is None
    assert model_context.stopping_criteria is None
    assert not hasattr(model_context, "cache")


def test_missing_yaml_config_is_an_empty_dict() -> None:
    assert Context("m", "dir").model_yaml_config == {}


def test_request_ids_are_a_dict_by_index(batch: Context) -> None:
    assert batch.request_ids == {0: "id-0", 1: "id-1"}
    assert batch.get_request_id() == "id-0"
    assert batch.get_request_id(1) == "id-1"
    assert batch.get_request_id(2) is None


def test_request_ids_can_be_assigned(batch: Context) -> None:
    batch.request_ids = {0: "other"}
    assert batch.get_request_id(0) == "other"
    assert batch.request_ids == {0: "other"}


def test_header_is_found_by_the_clients_spelling_first(batch: Context) -> None:
    assert batch.get_request_header(1, "x-trace") == "b"
    assert batch.get_request_header(1, "X-TRACE") == "c"


def test_header_is_found_in_any_case(batch: Context) -> None:
    assert batch.get_request_header(0, "x-trace") == "a"
    assert batch.get_request_header(0, "ACCEPT") == "*/*"
    assert batch.get_request_header(0, "missing") is None


def test_all_headers_keep_the_clients_spelling(batch: Context) -> None:
    assert batch.get_all_request_header(0) == {"X-Trace": "a", "Accept": "*/*"}


def test_sequence_id_comes_from_its_header(batch: Context) -> None:
    assert batch.get_sequence_id(1) == "s7"
    assert batch.get_sequence_id(0) is None


def test_sequence_header_name_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_REQUEST_SEQUENCE_ID", "my-sequence")
    batch = Context("m", "dir").for_batch(["i"], [[("My-Sequence", "9")]])
    assert batch.header_key_sequence_id == "my-sequence"
    assert batch.get_sequence_id(0) == "9"


def test_response_headers_and_content_type(batch: Context) -> None:
    assert batch.get_response_headers(0) == {}
    batch.set_response_content_type(0, "text/csv")
    batch.set_response_header(0, "X-Rows", "3")
    assert batch.get_response_content_type(0) == "text/csv"
    assert batch.get_response_headers(0) == {"content-type": "text/csv", "X-Rows": "3"}
    assert batch.get_response_headers(1) == {}


def test_response_header_must_be_text_without_line_breaks(batch: Context) -> None:
    with pytest.raises(TypeError, match="X-Rows"):
        batch.set_response_header(0, "X-Rows", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="line break"):
        batch.set_response_header(0, "X-Echo", "a\r\nSet-Cookie: b")


def test_response_status_of_one_and_of_all(batch: Context) -> None:
    assert batch.get_response_status(0) == (200, None)
    batch.set_response_status(418, "teapot", idx=1)
    assert batch.get_response_status(1) == (418, "teapot")
    batch.set_all_response_status(500, "broken")
    assert [batch.get_response_status(i) for i in range(2)] == [(500, "broken")] * 2


def test_request_processor_of_old_archives_reports_status(batch: Context) -> None:
    batch.request_processor[0].report_status(500, "Unknown inference error")
    assert batch.get_response_status(0) == (500, "Unknown inference error")
    assert batch.request_processor[0].get_response_status_code() == 500
    assert len(batch.request_processor) == 2


def test_request_processors_can_be_assigned(model_context: Context) -> None:
    model_context.request_processor = [RequestProcessor({"a": "1"})]
    assert model_context.get_request_header(0, "A") == "1"


def test_batches_do_not_share_answers(model_context: Context) -> None:
    first = model_context.for_batch(["1"], [[]])
    second = model_context.for_batch(["2"], [[]])
    first.set_response_header(0, "a", "1")
    first.stopping_criteria = [None]
    assert second.get_response_headers(0) == {}
    assert model_context.for_batch(["3"], [[]]).stopping_criteria is None


def test_what_a_handler_keeps_on_the_context_reaches_every_batch(model_context: Context) -> None:
    cache: dict[str, Any] = {"n": 1}
    model_context.cache = cache  # type: ignore[attr-defined]
    batch = model_context.for_batch(["1"], [[]])
    assert batch.cache is cache  # type: ignore[attr-defined]


# --- one object ---------------------------------------------------------------------------------------------------


def test_a_new_batch_takes_the_place_of_the_one_before(batch: Context) -> None:
    batch.set_all_response_status(400, "first")
    batch.stopping_criteria = [None]
    batch.note = "mine"  # type: ignore[attr-defined]
    before = batch.bind(Batch(["next"], [[("X-Trace", "z")]]))
    assert before is not None and before.request_ids == ["id-0", "id-1"]
    assert batch.request_ids == {0: "next"} and len(batch.request_processor) == 1
    assert batch.get_request_header(0, "X-Trace") == "z"
    assert batch.get_response_status(0) == (200, None) and batch.get_response_headers(0) == {}
    assert batch.note == "mine" and batch.stopping_criteria == [None]  # type: ignore[attr-defined]


def test_before_the_first_batch_there_are_no_requests(model_context: Context) -> None:
    assert model_context.request_ids is None and model_context.request_processor is None
    assert model_context.get_request_id() is None and model_context.remaining_s() is None
    assert not model_context.cancelled and not model_context.is_cancelled(3)
    model_context.set_response_status(400, "", 0)  # as TorchServe: nothing happens
    model_context.cl_socket = object()
    for ask in (model_context.get_all_request_header, model_context.get_response_headers, model_context.get_sequence_id,
                model_context.get_response_content_type):  # fmt: skip
        with pytest.raises(TypeError, match="has no request here"):
            ask(0)


def test_indices_are_a_lists(batch: Context) -> None:
    batch.set_response_status(404, "x", -1)
    assert batch.get_response_status(1) == (404, "x")
    assert batch.get_request_header(-1, "x-trace") == "b"
    assert (batch.get_request_id(-1), batch.get_request_id("0"), batch.get_request_id(None)) == (None,) * 3  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        batch.set_response_status(404, "x", 5)
    with pytest.raises(TypeError):
        batch.get_request_header("0", "a")  # type: ignore[arg-type]
    batch.request_ids[0] = "changed"
    assert batch.get_request_id(0) == "changed"
    assert batch._request_processor is batch.request_processor


# What TorchServe answers was measured: 200 with the header, or a worker that dies, which is an exception here.


@pytest.mark.parametrize("name", ["X-A", "X(A)", "X/A", "!#$%&'*+.^_`|~", "x<a>", '"', "9"])
def test_a_name_that_torchserve_sends_can_be_set(batch: Context, name: str) -> None:
    batch.set_response_header(0, name, "v")
    assert answer_head(batch, 0).headers == {name: "v"}


@pytest.mark.parametrize(
    "name", ["", "X A", " X", "X ", "X\tA", "X\nA", "X\rA", "X\0A", "X:A", "X,A", "X;A", "X=A", "Xé", "X日", "X\x7fA"]
)
def test_a_name_that_torchserve_does_not_send_is_refused_where_it_is_set(batch: Context, name: str) -> None:
    with pytest.raises(ValueError, match="response header"):
        batch.set_response_header(0, name, "v")
    batch.get_response_headers(0)[name] = "v"  # past the check
    with pytest.raises(HandlerError) as caught:
        answer_head(batch, 0)
    assert "response header" in caught.value.detail["text"]


@pytest.mark.parametrize(
    ("value", "sent"),
    [("", ""), ("  a  ", "  a  "), ("a\tb", "a\tb"), ("a\x01b", "a\x01b"), ("a\x7fb", "a\x7fb"), ("é", "é"),
     ("日本", "??"), ("\ud800", "?"), ("a" * 70_000, "a" * 70_000)],
)  # fmt: skip
def test_a_value_is_sent_as_torchserve_sends_it(batch: Context, value: str, sent: str) -> None:
    batch.set_response_header(0, "X-A", value)
    assert answer_head(batch, 0).headers == {"X-A": sent}


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\r\nSet-Cookie: b", "a\0b", "a\x0bb", "a\x0cb", "a\n b"])
def test_a_value_that_ends_a_line_is_refused(batch: Context, value: str) -> None:
    with pytest.raises(ValueError, match="'X-A' holds a"):
        batch.set_response_header(0, "X-A", value)
    with pytest.raises(ValueError, match="'content-type' holds a"):
        batch.set_response_content_type(0, value)


def test_of_names_that_differ_in_case_the_last_is_sent_and_the_content_type_first() -> None:
    assert sent_headers({"X-A": "1", "B": "2", "x-a": "3"}) == {"x-a": "3", "B": "2"}
    assert sent_headers({"Content-Type": "a/b", "content-type": "c/d"}) == {"Content-Type": "a/b"}
    assert sent_headers({"content-type": "c/d", "Content-Type": "a/b"}) == {"Content-Type": "a/b"}


class Number:
    """An integer of somebody's own, as numpy's are."""

    def __index__(self) -> int:
        return 404


@pytest.mark.parametrize(
    ("status", "phrase", "sent"),
    [(None, None, (200, "")), (404, None, (404, "")), (HTTPStatus.NOT_FOUND, "", (404, "")), (Number(), "", (404, "")),
     (404, "é", (404, "é")), (404, "日", (404, "?")), (404, "a\r\nX: y\0", (404, "a  X: y "))],
)  # fmt: skip
def test_statuses_that_can_be_sent(batch: Context, status: Any, phrase: Any, sent: tuple[int, str]) -> None:
    batch.set_response_status(status, phrase, 0)
    assert answer_head(batch, 0)[:2] == sent


@pytest.mark.parametrize(
    ("status", "phrase"),
    [("404", ""), (404.0, ""), (True, ""), (0, ""), (101, ""), (199, ""), (600, ""), (-1, ""), (2**40, ""), (404, 5),
     (404, b"x"), (404, ["x"])],
)  # fmt: skip
def test_statuses_that_cannot_be_sent(batch: Context, status: Any, phrase: Any) -> None:
    batch.set_response_status(status, phrase, 0)
    with pytest.raises(HandlerError, match=r"the handler set the (response status|reason phrase)"):
        answer_head(batch, 0)


def test_what_a_handler_says_of_caches_is_sent_in_default_mode_only(batch: Context) -> None:
    batch.set_response_header(0, "cache-Control", "max-age=60")
    batch.set_response_header(0, "X-A", "1")
    assert answer_head(batch, 0).headers == {"cache-Control": "max-age=60", "X-A": "1"}
    assert answer_head(batch, 0, is_strict=True).headers == {"X-A": "1"}
