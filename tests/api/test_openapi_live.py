"""A running server against its own description: whatever schemathesis makes up is answered as the documents say."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from openapi_spec_validator import validate
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.core.errors import InternalError

from pyserve.api import openapi
from tests.support import serving_models
from tests.support.handler_archives import write_handler
from tests.support.serving import LIMIT_S, SEED, Server

pytestmark = pytest.mark.server

EXAMPLES = 20  # of each operation and mode
CONFORMANCE = ("status_code_conformance", "content_type_conformance", "response_schema_conformance",
               "response_headers_conformance")  # fmt: skip
# An inference listener brings whatever comes to the handler; a management one reads it.
STRICT = ("negative_data_rejection", "positive_data_acceptance")
# What cannot be said in a schema: that min_worker <= max_worker; that url is needed in the query, unless there is a
# body, in which case the query is not read.
EXCUSED = {
    "setAutoScale": ("positive_data_acceptance",), "version_setAutoScale": ("positive_data_acceptance",),
    "registerModel": STRICT,
}  # fmt: skip
# So that what is made up does not start a thousand workers, or wait an hour for a batch.
MOST = {"min_worker": 2, "max_worker": 2, "initial_workers": 2, "batch_size": 8, "min_batch": 1, "max_batch_delay": 50,
        "response_timeout": 60, "startup_timeout": 60}  # fmt: skip

HANDLER = """
import json


def handle(data, context):
    if data is None:
        return None
    if context.get_request_header(0, "describe"):
        return [{"about": "says back what came"}]
    return [str(sorted(row)) for row in data]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("described"))
    for name in ("linear", "victim"):
        serving_models.write_linear(server.store, name)
    write_handler(server.store, "handler", HANDLER)
    server.start("--models", "linear.mar", "handler.mar")
    try:
        yield server
    finally:
        server.kill()


def document_of(server: Server, port: str, path: str = "/") -> Any:
    return server.ask("OPTIONS", path, port=port).json


@pytest.mark.parametrize(
    ("port", "path"),
    [("inference", "/"), ("management", "/"), ("metrics", "/"), ("inference", "/predictions/linear"),
     ("management", "/models/linear"), ("inference", "/invocations")],
)  # fmt: skip
def test_every_document_is_valid(server: Server, port: str, path: str) -> None:
    document = document_of(server, port, path)
    validate(document)
    if path == "/":
        assert server.ask("GET", "/api-description", port=port).json == document


def test_what_no_listener_has_here_is_valid_too() -> None:
    everything = [each.pattern for each in (*openapi._INFERENCE, *openapi._MANAGEMENT)]
    validate(openapi.inference_api(everything))
    validate(openapi.management_api(everything))


def tame(case: Any, draw: Any) -> None:
    """Names what there is, now and then, and keeps numbers small enough for a test."""
    removes = case.method == "DELETE" or case.path.endswith("/unload")
    names = (
        ["victim", "nobody"] if removes or case.path.endswith("/load") else ["handler", "handler", "linear", "nobody"]
    )
    if "model_name" in (case.path_parameters or {}):
        case.path_parameters["model_name"] = draw(st.sampled_from(names))
    if "model_version" in (case.path_parameters or {}) and draw(st.integers(0, 3)):
        case.path_parameters["model_version"] = "1.0"
    for values in (case.query, case.body):
        if not isinstance(values, dict):
            continue
        for name, most in MOST.items():
            if name in values and str(values[name]).isdigit() and int(values[name]) > most:
                values[name] = most
        if case.path == "/invocations" and "model_name" in values:
            values["model_name"] = draw(st.sampled_from(names))
        if "url" in values and draw(st.booleans()):
            values["url"] = "victim.mar"


class Listener:
    """Asks one listener what schemathesis makes up from its document."""

    def __init__(self, server: Server, port: str, document: Any = None):
        self._document = document or document_of(server, port)
        self._schema = schemathesis.openapi.from_dict(self._document)
        self._schema.config.update(base_url=server.url(port))
        self._session = requests.Session()
        self._checks = [CHECKS.get_one(name) for name in (*CONFORMANCE, *(STRICT if port == "management" else ()))]
        self.statuses: dict[str, Counter[int]] = defaultdict(Counter)  # by operationId

    def operations(self) -> list[Any]:
        return [found.ok() for found in self._schema.get_all_operations()]

    def check(self, operation: Any, mode: GenerationMode) -> None:
        """Fails at the first answer that is not as the document says."""

        def ask(data: Any) -> None:
            case = data.draw(cases)
            tame(case, data.draw)
            self._ask(case, operation)

        run = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))(
            seed(SEED)(given(st.data())(ask))
        )
        try:
            cases = operation.as_strategy(generation_mode=mode)  # once: making it takes longer than many draws
            run()
        except (Unsatisfiable, InternalError):
            assert mode is GenerationMode.NEGATIVE  # nothing that it takes can be wrong
        except BaseException as error:
            error.add_note(f"{mode.value} examples of {operation.method.upper()} {operation.path}")
            raise

    def _ask(self, case: Any, operation: Any) -> None:
        response = case.call(session=self._session, timeout=LIMIT_S)
        id = operation.definition.raw["operationId"]
        self.statuses[id][response.status_code] += 1
        excluded = [CHECKS.get_one(name) for name in EXCUSED.get(id, ())]
        case.validate_response(response, checks=self._checks, excluded_checks=excluded)
        # "default" stands for what HTTP refuses and what handlers say, not for failures of the server.
        documented = self._document["paths"][operation.path][operation.method.lower()]["responses"]
        assert response.status_code < 500 or str(response.status_code) in documented, response.text
        if response.status_code >= 400 and response.headers.get("content-type") == "application/json":
            assert "Traceback" not in response.text


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["as said", "otherwise"])
@pytest.mark.parametrize("port", ["inference", "metrics", "management"])
def test_answers_are_as_the_document_says(server: Server, port: str, mode: GenerationMode) -> None:
    print(f"PYSERVE_TEST_SEED={SEED}")
    listener = Listener(server, port)
    for operation in listener.operations():
        listener.check(operation, mode)
    print(json.dumps(listener.statuses))
    if mode is GenerationMode.POSITIVE:
        succeeded = {id for id, counts in listener.statuses.items() if min(counts) < 300}
        wanted = {operation.definition.raw["operationId"] for operation in listener.operations()}
        assert wanted - succeeded <= {"version_unregisterModel"}, listener.statuses
    assert server.ask("GET", "/live").status == 200


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["as said", "otherwise"])
def test_each_model_answers_as_the_live_document_says(server: Server, mode: GenerationMode) -> None:
    while server.ask("DELETE", "/models/victim", port="management").status < 300:
        pass  # versions that the examples before have left
    document = server.ask("GET", "/openapi.json").json
    listener = Listener(server, "inference", document)
    operations = [each for each in listener.operations() if "tags" in each.definition.raw]
    assert {each.path for each in operations} == {
        "/predictions/handler", "/predictions/linear", "/v2/models/linear/infer"
    }  # fmt: skip
    for operation in operations:
        listener.check(operation, mode)
    if mode is GenerationMode.POSITIVE:
        assert all(200 in counts for counts in listener.statuses.values()), listener.statuses
