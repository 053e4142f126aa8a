"""Spans: one per prediction and one per stage, children of the client's, sent to a collector by OTLP."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pyserve.request.messages import Request
from pyserve.request.stages import Stages
from pyserve.telemetry import spans
from tests.support import serving_models
from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, LIMIT_S, Server

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"

HEADERS = """
def handle(data, context):
    if data is None:
        return None
    names = ("traceparent", "tracestate")
    return [{name: context.get_request_header(index, name) for name in names} for index in range(len(data))]
"""


class Collector:
    """Takes OTLP over HTTP and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        self._news = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()
                with collector._news:
                    for of_resource in message.resource_spans:
                        attributes = of_resource.resource.attributes
                        collector.resources.append({each.key: each.value.string_value for each in attributes})
                        for scope in of_resource.scope_spans:
                            collector.spans += scope.spans
                    collector._news.notify_all()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def of_request(self, request_id: str) -> tuple[Any, dict[str, Any]]:
        """The span of a request, and its stages by name, when they have come."""

        def root() -> Any:
            return next((s for s in self.spans if attributes_of(s).get("pyserve.request_id") == request_id), None)

        with self._news:
            # Children end first, so that they are there when the root is.
            assert self._news.wait_for(lambda: root() is not None, LIMIT_S), "no span came"
            found = root()
            return found, {span.name: span for span in self.spans if span.parent_span_id == found.span_id}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def attributes_of(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("spans"))
    serving_models.write_linear(server.store)
    write_handler(server.store, "headers", HEADERS)
    server.environment |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_SERVICE_NAME": "tested",
    }  # fmt: skip
    server.start("--models", "all")
    try:
        yield server
    finally:
        server.kill()


def ask(server: Server, model: str, value: object, **headers: str) -> Any:
    return server.ask("POST", f"/predictions/{model}", json.dumps(value).encode(), {**JSON, **headers})


@pytest.mark.server
def test_a_prediction_is_a_child_of_the_clients_span_with_a_child_per_stage(
    server: Server, collector: Collector
) -> None:
    for model, value in (("linear", [1, 2, 3, 4]), ("headers", "x")):
        answer = ask(server, model, value, traceparent=SAMPLED)
        root, stages = collector.of_request(answer.headers["x-request-id"])
        assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
        assert (root.name, root.kind) == (f"predict {model}", 2)  # SERVER
        told = attributes_of(root)
        assert told["http.response.status_code"] == 200 and told["pyserve.model_version"] == "1.0"
        assert (told["pyserve.batch_size"], told["pyserve.release"]) == (1, "full")
        assert {"queue", "staging", "preprocess", "inference", "postprocess", "delivery"} <= set(stages)
        assert {span.trace_id.hex() for span in stages.values()} == {TRACE}
        for span in stages.values():
            # A few us: the two clocks are read one after the other, and not at the same moment for both.
            assert root.start_time_unix_nano - 1_000_000 <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= root.end_time_unix_nano + 1_000_000
        order = ("queue", "staging", "inference", "postprocess") if model == "headers" else ("queue", "inference")
        starts = [stages[name].start_time_unix_nano for name in order]
        assert starts == sorted(starts)
    assert collector.resources[0]["service.name"] == "tested"


@pytest.mark.server
def test_the_handler_finds_the_servers_span_as_its_parent(server: Server, collector: Collector) -> None:
    answer = ask(server, "headers", "x", traceparent=SAMPLED, tracestate="vendor=1")
    root, _ = collector.of_request(answer.headers["x-request-id"])
    assert answer.json == {"traceparent": f"00-{TRACE}-{root.span_id.hex()}-01", "tracestate": "vendor=1"}


@pytest.mark.server
@pytest.mark.parametrize("malformed", ["nonsense", SAMPLED.upper(), f"00-{'0' * 32}-{PARENT}-01", f"ff{SAMPLED[2:]}"])
def test_a_malformed_parent_is_ignored_together_with_its_state(
    server: Server, collector: Collector, malformed: str
) -> None:
    answer = ask(server, "headers", "x", traceparent=malformed, tracestate="vendor=1")
    root, _ = collector.of_request(answer.headers["x-request-id"])
    assert root.trace_id.hex() not in (TRACE, "0" * 32) and root.parent_span_id == b""
    assert answer.json["tracestate"] is None
    assert answer.json["traceparent"].startswith(f"00-{root.trace_id.hex()}-{root.span_id.hex()}-")


@pytest.mark.server
def test_what_the_client_does_not_sample_is_not_sent(server: Server, collector: Collector) -> None:
    unsampled = ask(server, "headers", "x", traceparent=UNSAMPLED)
    assert unsampled.json["traceparent"].startswith(f"00-{TRACE}-") and unsampled.json["traceparent"].endswith("-00")
    sampled = ask(server, "headers", "x", traceparent=SAMPLED)
    collector.of_request(sampled.headers["x-request-id"])  # spans leave in order
    ids = [attributes_of(span).get("pyserve.request_id") for span in collector.spans]
    assert unsampled.headers["x-request-id"] not in ids


@pytest.mark.server
def test_a_failure_is_an_error(server: Server, collector: Collector) -> None:
    server.manage("PUT", "/models/headers?min_worker=0&max_worker=0&synchronous=true")
    try:
        answer = ask(server, "headers", "x", traceparent=SAMPLED)
    finally:
        server.manage("PUT", "/models/headers?min_worker=1&max_worker=1&synchronous=true")
    assert answer.status == 503
    root, stages = collector.of_request(answer.headers["x-request-id"])
    assert root.status.code == 2 and not stages


@pytest.mark.server
def test_without_a_collector_headers_pass_as_they_came_and_a_dead_one_costs_nothing(
    server: Server, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        for endpoint in ("", f"http://127.0.0.1:{taken.getsockname()[1]}"):
            folder = tmp_path / (endpoint[-5:] or "none")
            folder.mkdir()
            other = Server(folder, server.store)
            if endpoint:
                other.environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = endpoint
            other.start("--models", "headers.mar")
            try:
                answer = ask(other, "headers", "x", traceparent=SAMPLED, tracestate="vendor=1")
                assert answer.status == 200
                seen = answer.json["traceparent"]
                assert (seen == SAMPLED) is not bool(endpoint) and seen[:36] == SAMPLED[:36]
                assert other.run("stop").returncode == 0
            finally:
                other.kill()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, ""),
        ({"OTEL_SDK_DISABLED": "true"}, ""),
        ({"OTEL_TRACES_EXPORTER": "none"}, ""),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"),
    ],
)
def test_there_are_no_spans_unless_the_environment_wants_them(
    environ: dict[str, str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert spans.open_tracer(environ and {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", **environ}) is None
    assert said in caplog.text and bool(caplog.text) is bool(said)


def test_without_the_extra_the_log_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert spans.open_tracer({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}) is None
    assert (
        "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http" in caplog.text
        and "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" in caplog.text
    )


def test_two_parents_are_none_and_a_client_that_has_gone_is_told() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = spans.Tracer(provider)
    request = Request("POST", "/p", id="r", headers=[("traceparent", SAMPLED), ("X-A", "1"), ("Traceparent", SAMPLED)])
    stages = Stages(is_told=False)
    stages.times["queue"] = (5, 1)  # never ends before it begins
    stages.span = tracer.begin(request, "m", "1.0")
    assert [name for name, _ in request.headers] == ["X-A", "traceparent"]
    assert request.header_text.startswith("X-A\n1\ntraceparent\n00-") and TRACE not in request.header_text
    tracer.end(stages, None)
    tracer.end(stages, None)  # once
    child, root = exporter.get_finished_spans()
    assert root.parent is None and root.attributes is not None and root.status.is_ok is False
    assert root.attributes["error.type"] == "client disconnected"
    assert child.parent is not None and child.parent.span_id == root.context.span_id
    assert child.start_time == child.end_time
