"""``/openapi.json`` and ``/docs`` of a server: valid, true of the models that it has, bounded, and under its keys."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from openapi_spec_validator import validate
from PIL import Image

from pyserve.api import openapi
from pyserve.api.docs_page import FOLDER
from pyserve.api.openapi_live import MODELS_MAX, LiveDocument
from pyserve.api.openapi_models import EXAMPLE_COUNT_MAX, example_values, nested_schema
from pyserve.api.page_files import POLICY
from pyserve.handlers.tensor_spec import TensorSpec
from pyserve.input_config import DTYPES
from tests.api.test_routes import exchange_for
from tests.support import serving_models
from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, Server

SIZE_MAX = 60_000
TWO = [{"name": "x", "dtype": "float32", "shape": [4]}, {"name": "y", "dtype": "float32", "shape": [2]}]


class Two(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sum(1, keepdim=True) + y


class Whole(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def write_models(store: Path) -> None:
    serving_models.write_linear(store)
    serving_models.write_pictures(store)
    serving_models.write_torchscript(store, Two(), "two", config={"input": TWO})
    whole = {"dtype": "int64", "shape": ["2..3"], "vocabulary": 10}
    serving_models.write_torchscript(store, Whole(), "whole-2.x", config={"input": whole})
    write_handler(store, "own", "def handle(data, context):\n    return ['x'] * len(data) if data else None\n")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("documents"))
    write_models(server.store)
    server.start("--models", "all")
    try:
        yield server
    finally:
        server.kill()


def as_schema(schema: Any, document: Any) -> Any:
    """OpenAPI 3.0's dialect in JSON Schema's words."""
    if isinstance(schema, list):
        return [as_schema(each, document) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return as_schema(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
    made = {key: as_schema(value, document) for key, value in schema.items() if key != "nullable"}
    return {**made, "type": [made["type"], "null"]} if schema.get("nullable") is True else made


@pytest.mark.server
@pytest.mark.parametrize("port", ["inference", "management", "metrics"])
def test_each_ports_document_is_valid_and_has_all_of_its_description(server: Server, port: str) -> None:
    document = server.ask("GET", "/openapi.json", port=port).json
    validate(document)
    described = server.ask("OPTIONS", "/", port=port).json
    assert described["paths"].keys() <= document["paths"].keys() and "tags" not in described
    names = [each["name"] for each in document["tags"]]
    assert names == ([] if port == "metrics" else ["linear", "own", "pictures", "two", "whole-2.x"])


@pytest.mark.server
def test_examples_are_answered_as_the_document_says(server: Server) -> None:
    document = server.ask("GET", "/openapi.json").json
    asked = set()
    for path, item in document["paths"].items():
        operation = item.get("post", {})
        media = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        if "example" not in media or "tags" not in operation or "example" in str(media["example"]):
            continue
        if operation["tags"] == ["pictures"]:
            continue
        jsonschema.validate(media["example"], as_schema(media["schema"], document))
        answer = server.ask("POST", path, json.dumps(media["example"]).encode(), JSON)
        assert answer.status == 200, (path, answer.body)
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json, as_schema(schema, document))
        asked.add(path)
    assert asked == {
        "/predictions/linear", "/v2/models/linear/infer", "/predictions/two", "/v2/models/two/infer",
        "/predictions/whole-2.x", "/v2/models/whole-2.x/infer",
    }  # fmt: skip


@pytest.mark.server
def test_shapes_are_the_models_own(server: Server) -> None:
    paths = server.ask("GET", "/openapi.json").json["paths"]
    body = paths["/predictions/linear"]["post"]["requestBody"]["content"]
    schema = body["application/json"]["schema"]
    assert (schema["minItems"], schema["maxItems"], schema["items"]["type"]) == (4, 4, "number")
    assert "16 bytes of little-endian float32 [4]" in body["application/octet-stream"]["schema"]["description"]
    answered = paths["/predictions/linear"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert (answered["minItems"], answered["maxItems"]) == (3, 3)
    whole = paths["/predictions/whole-2.x"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert (whole["minItems"], whole["maxItems"], whole["items"]) == (
        2, 3, {"type": "integer", "minimum": 0, "maximum": 9},
    )  # fmt: skip
    assert list(paths["/predictions/pictures"]["post"]["requestBody"]["content"]) == [
        "image/*", "application/json", "multipart/form-data",
    ]  # fmt: skip
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    answer = server.ask("POST", "/predictions/pictures", file.getvalue(), {"content-type": "image/png"})
    jsonschema.validate(answer.json, {"type": "object", "additionalProperties": {"type": "number"}, "minProperties": 5})


@pytest.mark.server
def test_one_model_can_be_asked_for(server: Server) -> None:
    document = server.ask("GET", "/openapi.json?model=two").json
    assert [each["name"] for each in document["tags"]] == ["two"] and "/predictions/linear" not in document["paths"]
    assert server.ask("GET", "/openapi.json?model=tow").json["detail"]["fix"] == "did you mean two?"
    assert server.ask("GET", "/openapi.json?modle=two").status == 400


@pytest.mark.server
@pytest.mark.parametrize("port", ["inference", "management", "metrics"])
def test_the_page_is_there_with_a_policy_that_lets_nothing_else_in(server: Server, port: str) -> None:
    page = server.ask("GET", "/docs", port=port)
    assert page.status == 200 and page.headers["content-security-policy"] == POLICY
    for name in ("docs.js", "docs.css", "dom.js", "forms.js", "send.js", "icon.svg"):
        answer = server.ask("GET", f"/docs/{name}", port=port)
        assert answer.status == 200 and answer.headers["x-content-type-options"] == "nosniff"
        known = server.ask("GET", f"/docs/{name}", headers={"if-none-match": answer.headers["etag"]}, port=port)
        assert known.status == 304
    for name in ("nothing.js", "..%2fconsole.py", "%2e%2e"):
        assert server.ask("GET", f"/docs/{name}", port=port).status == 404


def test_the_pages_files_are_small_and_have_no_way_to_run_what_they_are_told() -> None:
    files = {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert sum(map(len, files.values())) < SIZE_MAX
    for name, text in files.items():
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http://", "https://"):
            assert word not in text.replace("http://www.w3.org/2000/svg", ""), (name, word)
    assert "<script>" not in files["index.html"] and "onclick" not in files["index.html"]


@pytest.mark.server
def test_keys_hold_for_the_document_and_the_page_tells_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path)
    write_models(server.store)
    (tmp_path / "config.properties").write_text("disable_token_authorization=false\n")
    server.start("--models", "linear.mar", "--ts-config", str(tmp_path / "config.properties"))
    try:
        keys = json.loads((tmp_path / "key_file.json").read_text())
        for port in ("inference", "management"):
            assert server.ask("GET", "/openapi.json", port=port).status == 401
            other = keys["management" if port == "inference" else "inference"]["key"]
            wrong = server.ask("GET", "/openapi.json", headers={"Authorization": f"Bearer {other}"}, port=port)
            assert wrong.status == 401 and b"linear" not in wrong.body
            right = {"Authorization": f"Bearer {keys[port]['key']}"}
            assert b"linear" in server.ask("GET", "/openapi.json", headers=right, port=port).body
            assert server.ask("GET", "/docs", port=port).status == 200
        for path in ("/predict", "/linea", "/predictions/linea"):
            answer = server.ask("POST", path, b"x")
            assert answer.status in (401, 404) and b"linear" not in answer.body, path
    finally:
        server.kill()


@pytest.mark.server
def test_one_listener_for_all_describes_all(tmp_path: Path) -> None:
    server = Server(tmp_path)
    serving_models.write_linear(server.store)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    flags = [part for name in ("inference", "management", "metrics") for part in (f"--{name}-address", address)]
    server.start("--models", "linear.mar", *flags)
    try:
        document = server.ask("GET", "/openapi.json").json
        validate(document)
        assert {"/predictions/linear", "/models", "/models/{model_name}", "/metrics", "/ping"} <= document[
            "paths"
        ].keys()
    finally:
        server.kill()


@pytest.mark.server
def test_strict_has_neither_document_nor_page(tmp_path: Path) -> None:
    server = Server(tmp_path)
    serving_models.write_linear(server.store)
    (tmp_path / "config.properties").write_text("compat=strict\ndisable_token_authorization=true\n")
    server.start("--models", "linear.mar", "--ts-config", str(tmp_path / "config.properties"))
    try:
        for path in ("/openapi.json", "/docs", "/docs/docs.js"):
            answer = server.ask("GET", path)
            assert answer.status == 404 and answer.json.keys() == {"code", "type", "message"}
    finally:
        server.kill()


# --- without a server -------------------------------------------------------------------------------------------------


class FakeModel(SimpleNamespace):
    """Can be referred to weakly, as a model can."""


def fake_model(name: str) -> Any:
    return FakeModel(
        name=name, version="1.0", state="READY", built_in_handler=None, network=None, has_ready_worker=True
    )


def fetched(document: LiveDocument, path: str = "/openapi.json") -> tuple[Any, bytes]:
    exchange, _ = exchange_for("GET", path)
    body = bytes(asyncio.run(document.show(exchange)).body)
    return json.loads(body), body


def test_thousands_of_models_make_a_document_of_a_hundred() -> None:
    models = [fake_model(f"model {number:05}") for number in range(10_000)]
    registry: Any = SimpleNamespace(default_models=lambda: models, get=lambda name: models[int(name[-5:])])
    live = LiveDocument(lambda: openapi.inference_api(["/predictions/{model_name}"]), registry)
    document, body = fetched(live)
    validate(document)
    assert len(document["tags"]) == MODELS_MAX and len(body) < 1_000_000
    assert document["info"]["description"].startswith(f"This server's API, with {MODELS_MAX} of its 10000 models")
    assert fetched(live)[1] == body
    models[0] = fake_model("another")
    assert b"/predictions/another" in fetched(live)[1], "what changed is seen"


def test_a_model_at_the_address_of_one_that_is_gone_is_described() -> None:
    models = [fake_model("first")]
    registry: Any = SimpleNamespace(default_models=lambda: models)
    live = LiveDocument(lambda: openapi.inference_api(["/predictions/{model_name}"]), registry)
    fetched(live)
    address = id(models.pop())
    others = []  # most often the first has the address already
    while id(model := fake_model("second")) != address and len(others) < 1000:
        others.append(model)
    models.append(model)
    assert b"/predictions/second" in fetched(live)[1]


@pytest.mark.parametrize(
    "name", ["{x}", "a b", "<script>alert(1)</script>", "%2e%2e", "?a=1#b", "\u00e4", '"', "x" * 128]
)
def test_names_of_any_kind_are_paths_of_their_own(name: str) -> None:
    registry: Any = SimpleNamespace(default_models=lambda: [fake_model(name)])
    document, _ = fetched(LiveDocument(lambda: openapi.inference_api(["/predictions/{model_name}"]), registry))
    validate(document)
    [own] = [path for path in document["paths"] if path != "/predictions/{model_name}"]
    assert not set(own) & set('{}?# <>"') and document["tags"] == [{"name": name}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [[], [3], [-1], ["2..4", 2], ["3.."]])
@pytest.mark.parametrize("values", [None, [0, 1]])
def test_examples_fit_the_schema_and_the_input(dtype: str, shape: list[Any], values: list[int] | None) -> None:
    entry = {"dtype": dtype, "shape": shape, **({"values": values} if values and dtype != "bool" else {})}
    spec = TensorSpec.from_config({"input": entry})
    example = example_values(spec)
    jsonschema.validate(example, nested_schema(spec))
    assert spec.read_nested(example).shape[1:] == spec.example().shape[1:]


def test_long_examples_are_left_out() -> None:
    assert example_values(TensorSpec("float32", (3, 224, 224))) is None
    assert example_values(TensorSpec("float32", (EXAMPLE_COUNT_MAX,))) is not None


@pytest.mark.server
def test_a_browser_sends_what_is_filled_in(server: Server) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: the page is not tried in a browser")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium: the page is not tried in a browser")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        hosts = set()
        page.on(
            "console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(server.url("inference") + "/docs")
        entry = page.locator("details", has_text="/predictions/linear").first
        entry.locator("summary").first.click()
        entry.get_by_role("button", name="Send").click()
        entry.locator("p.good").wait_for()
        shown = json.loads(entry.locator("pre").first.inner_text())
        sent = json.loads(entry.locator("textarea").first.input_value())
        assert shown == server.ask("POST", "/predictions/linear", json.dumps(sent).encode(), JSON).json
        entry.locator("textarea").first.fill("[1")
        entry.get_by_role("button", name="Send").click()
        entry.locator("p.bad").wait_for()
        assert "says application/json but is not" in entry.locator("pre").first.inner_text()
        page.fill("#filter", "predictions/two")
        assert page.locator("main > section > details").count() == 1
        browser.close()
    assert hosts == {server.url("inference").split("/")[2]}
    assert all("400" in problem for problem in problems), problems  # what was asked for, above
