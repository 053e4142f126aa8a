"""The Context that handlers see: TorchServe's members, headers by any spelling, cheap per-batch copies."""

from __future__ import annotations

from typing import Any

import pytest

from pyserve.context import Context, RequestProcessor


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
