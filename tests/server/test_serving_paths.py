"""Every path of the inference API over real sockets: what the handler sees of each, in both lanes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.handler_archives import Doubler, write_handler
from tests.support.serving import JSON, RAW, Server
from tests.support.serving_models import write_linear

pytestmark = pytest.mark.server

# Answers with all that a handler can know of a request.
SHOW = """
def shown(value):
    return ["bytearray", value.decode()] if isinstance(value, bytearray) else value


def handle(data, context):
    if data is None:
        return None
    names = ("explain", "url_path", "describe", "X-Own")
    return [
        {
            "row": {key: shown(value) for key, value in row.items()},
            "headers": {name: context.get_request_header(index, name) for name in names},
        }
        for index, row in enumerate(data)
    ]
"""

EXPLAINER = """
from ts.torch_handler.base_handler import BaseHandler


class Explainer(BaseHandler):
    def preprocess(self, data):
        return super().preprocess([row["body"]["data"] for row in data]).float()

    def get_insights(self, tensor_data, raw_data, target=0):
        return [{"target": target, "values": tensor_data[0].tolist()}]

    def describe_handle(self):
        return {"labels": ["a", "b"]}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("paths"))
    write_handler(server.store, "show", SHOW)
    write_handler(server.store, "explainer", EXPLAINER, network=Doubler())
    write_linear(server.store, "linear")
    with server:
        server.start("--models", "all")
        yield server


def ask(server: Server, path: str, body: bytes = b"[1]", headers: dict[str, str] | None = None) -> Any:
    answer = server.ask("POST", path, body, JSON if headers is None else headers)
    assert answer.status == 200, answer.body
    return answer.json


@pytest.mark.parametrize(
    ("path", "explain", "url_path"),
    [
        ("/predictions/show", "False", ""),
        ("/predictions/show/1.0", "False", ""),
        ("/predictions/show/1.0/v1/chat/completions", "False", "v1/chat/completions"),
        ("/explanations/show", "True", ""),
        ("/explanations/show/1.0", "True", ""),
        ("/explanations/show/1.0/a/b", "True", "a/b"),
        ("/v1/models/show:predict", "False", None),
        ("/v1/models/show:explain", "True", None),
        ("/v2/models/show/infer", "False", None),
        ("/v2/models/show/explain", "True", None),
        ("/models/show/invoke", None, None),
        ("/show/predict", None, None),
        ("/show/1.0/predict", None, None),
    ],
)
def test_the_handler_sees_which_path_was_asked(
    server: Server, path: str, explain: str | None, url_path: str | None
) -> None:
    seen = ask(server, path)
    assert seen["row"] == {"body": [1]}
    assert (seen["headers"]["explain"], seen["headers"]["url_path"]) == (explain, url_path)


def test_parameters_of_the_query_are_inputs_where_torchserve_takes_them_so(server: Server) -> None:
    wanted = {"body": [1], "a": ["bytearray", "x y"], "b": ["bytearray", ""]}
    for path in ("/models/show/invoke", "/show/predict", "/show/1.0/predict"):
        assert ask(server, f"{path}?a=x+y;b")["row"] == wanted
    for path in ("/predictions/show", "/explanations/show", "/v1/models/show:predict", "/v2/models/show/infer"):
        assert ask(server, f"{path}?a=x")["row"] == {"body": [1]}


def test_invocations_find_their_model_by_parameter_or_form_field(server: Server) -> None:
    assert ask(server, "/invocations?model_name=show&a=1")["row"]["a"] == ["bytearray", "1"]
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert ask(server, "/invocations", b"model_name=show&n=2", form)["row"]["n"] == ["bytearray", "2"]
    answer = server.ask("POST", "/invocations", b"[1]", JSON)
    assert (answer.status, answer.json["message"]) == (400, "Parameter model_name is required.")


def test_invocations_go_to_the_only_model(tmp_path: Path) -> None:
    server = Server(tmp_path)
    write_linear(server.store, "linear")
    with server:
        server.start("--models", "all")
        assert server.ask("POST", "/invocations", bytes(16), RAW).status == 200


def test_native_models_answer_on_every_path(server: Server) -> None:
    expected = server.ask("POST", "/predictions/linear", bytes(16), RAW).body
    for path in ("/v1/models/linear:predict", "/v2/models/linear/infer", "/models/linear/invoke", "/linear/predict"):
        answer = server.ask("POST", path, bytes(16), RAW)
        assert (answer.status, answer.body) == (200, expected), path


@pytest.mark.parametrize("path", ["/explanations/x", "/v1/models/x:predict", "/v2/models/x/infer", "/models/x/invoke",
                                  "/invocations?model_name=x", "/x/predict"])  # fmt: skip
def test_unknown_model_is_404_on_every_path(server: Server, path: str) -> None:
    answer = server.ask("POST", path, b"1")
    assert (answer.status, answer.json["type"]) == (404, "ModelNotFoundException")


def test_options_describe_instead_of_running(server: Server) -> None:
    paths = server.ask("OPTIONS", "/").json["paths"]
    for path in ("/explanations/{model_name}", "/v1/models/{model_name}:explain", "/v2/models/{model_name}/infer",
                 "/models/{model_name}/invoke", "/invocations"):  # fmt: skip
        assert "post" in paths[path]
    for path in ("/explanations/show", "/v1/models/show:predict", "/predictions/show/1.0/a/b", "/models/show/invoke"):
        assert server.ask("OPTIONS", path).json["info"]["title"] == "RESTful API for: show"


def test_explanations_and_descriptions_come_from_the_handler(server: Server) -> None:
    explained = ask(server, "/explanations/explainer", json.dumps({"data": [1.0, 2.0], "target": 3}).encode())
    assert explained == {"target": 3, "values": [1.0, 2.0]}
    described = server.manage("GET", "/models/explainer?customized=true")[0]
    assert described["customizedMetadata"] == {"labels": ["a", "b"]}


def test_a_handler_without_insights_says_so(server: Server) -> None:
    answer = server.ask("POST", "/explanations/linear", bytes(16), RAW)
    assert (answer.status, "gives no explanations" in answer.json["message"]) == (501, True), answer.body
