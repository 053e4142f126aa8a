"""What a 404 says of where the thing that was meant is: the right port, the right path, the models there are."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import pytest

from pyserve.api.routes import Router
from pyserve.api.signposts import PATH_SHOWN_MAX, Signposts
from pyserve.config.config import Config
from pyserve.errors import ModelNotFoundError
from pyserve.fetch.sources import _find
from pyserve.models.served_names import (
    CLOSELY_COMPARED_MAX,
    COMPARED_MAX,
    COMPARED_SIZE_MAX,
    near_name,
    no_such_version,
)
from pyserve.request.messages import ErrorFormat, Request, Response
from tests.api.test_routes import ask, echo, error_of

MODELS = ["digits", "net"]
FIRSTS = ["predictions", "explanations", "ping", "v1", "v2", "token"]
CONFIG = Config()


def told(path: str, *names: str, **rest: Any) -> str:
    signposts = Signposts(CONFIG, names or ("inference",), **{"models": lambda: MODELS, **rest})
    return str(signposts(Request("GET", path, id="an-id"), FIRSTS).get("fix", ""))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/models", "that is the management API: http://127.0.0.1:8081/models"),
        ("/models/net/1.0", "that is the management API: http://127.0.0.1:8081/models/net/1.0"),
        ("/metrics", "that is the metrics API: http://127.0.0.1:8082/metrics"),
        ("/model/net", "that is the management API: http://127.0.0.1:8081/models/net"),
        ("/predict", "name the model: POST /predictions/MODEL; the models here are digits, net"),
        ("/predictions", "name the model: POST /predictions/MODEL; the models here are digits, net"),
        ("/explanations", "name the model: POST /explanations/MODEL; the models here are digits, net"),
        ("/prediction/net", "did you mean /predictions/net?"),
        ("/Predictions/net", "did you mean /predictions/net?"),
        ("/net", "did you mean POST /predictions/net?"),
        ("/Net", "did you mean POST /predictions/net?"),
        ("/health", "GET /ping says"),
        ("/swagger", "the API is described at /docs"),
        ("/v1/chat/completions", "POST /predictions/MODEL/VERSION/v1/chat/completions"),
        ("/v2/models/net/predict", "/v2/models/MODEL/infer"),
        ("/zzzzzzzz", ""),
        ("/", ""),
        ("//", ""),
    ],
)
def test_what_was_meant_is_named(path: str, text: str) -> None:
    found = told(path)
    assert text in found if text else found == ""


def test_another_port_names_the_one_of_inference() -> None:
    assert told("/predictions/net", "management") == "that is the inference API: http://127.0.0.1:8080/predictions/net"
    assert told("/health", "management", models=None).endswith("(on the inference API: http://127.0.0.1:8080)")
    assert told("/models", "inference", "management") == "", "it is here, so nothing is elsewhere"


def test_what_may_not_be_listed_or_shown_is_not() -> None:
    for path in ("/predict", "/predictions", "/net", "/digit", "/v1/completions"):
        found = told(path, models=None)
        assert "net" not in found and "digits" not in found, path
    for path in ("/models", "/metrics", "/model/net"):
        found = told(path, tells_addresses=False)
        assert "another port" in found and "127.0.0.1" not in found, path


@pytest.mark.parametrize("path", ["/models/" + "x" * 5000, "/prediction/" + "\u00e9\x1b[2J" * 1000, "/" + "n" * 9000])
def test_the_path_is_repeated_short_and_without_escapes(path: str) -> None:
    found = told(path)
    assert len(found) < PATH_SHOWN_MAX + 100 and found.isascii() and found.isprintable()


def test_a_switched_off_listener_is_named_as_that() -> None:
    signposts = Signposts(Config(enable_metrics_api=False), ["inference"])
    assert "off here (enable_metrics_api)" in signposts(Request("GET", "/metrics", id="i"), FIRSTS)["fix"]


def test_the_keys_of_torchserve_stay_as_they_are_and_strict_has_no_more() -> None:
    def answer(**how: Any) -> Response:
        signposts = Signposts(CONFIG, ["inference"])
        router = Router([("GET", "/ping", echo)], signposts=signposts, error_format=ErrorFormat(**how))
        return ask(router, "GET", "/models")

    error = error_of(answer())
    assert error["detail"]["fix"].startswith("that is the management API")
    assert {key: error[key] for key in ("code", "type", "message")} == {
        "code": 404, "type": "ResourceNotFoundException",
        "message": "Requested resource is not found, please refer to API document.",
    }  # fmt: skip
    assert error_of(answer(with_detail=False)).keys() == {"code", "type", "message"}


def test_a_method_that_is_not_answered_names_those_that_are() -> None:
    answer = ask(Router([("GET", "/ping", echo)]), "PUT", "/ping")
    assert error_of(answer)["detail"]["fix"] == "methods here: GET, HEAD"


def test_of_thousands_of_names_a_few_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    names = sorted(f"model-{number:05}" for number in range(10_000))
    calls = {"quick_ratio": 0, "ratio": 0}

    def counted(method: str) -> Any:
        original = getattr(difflib.SequenceMatcher, method)

        def call(self: Any) -> float:
            calls[method] += 1
            return float(original(self))

        return call

    for method in calls:
        monkeypatch.setattr(difflib.SequenceMatcher, method, counted(method))
    near_name("model-0500", names)
    assert calls["quick_ratio"] <= COMPARED_MAX + CLOSELY_COMPARED_MAX and calls["ratio"] <= 2 * CLOSELY_COMPARED_MAX
    before = dict(calls)
    assert not near_name("m" * (COMPARED_SIZE_MAX + 1), names) and calls == before
    assert not near_name("net", ["n" * (COMPARED_SIZE_MAX + 1)]) and calls == before
    monkeypatch.undo()
    assert near_name("model-0500", names).startswith("model-05")
    assert near_name("model-05001x", names) == "model-05001"


def test_a_version_that_there_is_not_names_those_there_are() -> None:
    assert no_such_version("text", ["2.0", "1.0"]).detail == {"fix": "its versions are 1.0, 2.0"}
    assert no_such_version("text", [str(number) for number in range(9)]).detail["fix"].endswith("4, and 4 more")


def test_a_file_that_is_not_in_the_store_names_the_folder_and_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        _find(tmp_path, "nope.mar")
    assert caught.value.detail["where"] == str(tmp_path) and caught.value.detail["fix"].endswith("it is empty")
    for number in range(7):
        (tmp_path / f"m{number}.mar").write_bytes(b"")
    with pytest.raises(ModelNotFoundError) as caught:
        _find(tmp_path, "nope.mar")
    assert caught.value.detail["fix"].endswith("it has m0.mar, m1.mar, m2.mar, m3.mar, m4.mar, and 2 more")
    shown = json.loads(bytes(ErrorFormat(with_private_detail=False).response(caught.value, "an-id").body))
    assert str(tmp_path) not in json.dumps(shown)
