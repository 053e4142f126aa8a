"""From requests to endpoints, from errors to answers, and which browsers are refused."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from pyserve.api.checks import protected
from pyserve.api.routes import ANY, Route, Router, inference_descriptions, metrics_routes
from pyserve.config.address import Address
from pyserve.config.config import Config
from pyserve.errors import BadRequestError, HandlerError, ModelNotFoundError, OverloadedError
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat, Request, Response
from pyserve.security.browser_guard import BrowserGuard
from pyserve.security.cors import Cors
from pyserve.telemetry.metrics import Metrics


def exchange_for(method: str, path: str, headers: dict[str, str] | None = None) -> tuple[Exchange, list[Response]]:
    answers: list[Response] = []

    def deliver(exchange: Exchange) -> None:
        assert exchange.response is not None
        answers.append(exchange.response)

    request = Request(method, path, headers=list((headers or {}).items()), id="an-id")
    return Exchange(request, deliver, keep_alive=True), answers


def ask(router: Router, method: str, path: str, headers: dict[str, str] | None = None) -> Response:
    """The answer, once every task of the router is done."""

    async def run() -> Response:
        exchange, answers = exchange_for(method, path, headers)
        router(exchange)
        await asyncio.gather(*router.tasks)
        [answer] = answers
        return answer

    return asyncio.run(run())


def echo(exchange: Exchange, **parameters: str) -> Response:
    return Response(200, json.dumps([exchange.request.method, parameters]).encode())


def failing(error: Exception) -> Any:
    def endpoint(exchange: Exchange) -> Response:
        raise error

    return endpoint


def error_of(response: Response) -> dict[str, Any]:
    return json.loads(bytes(response.body))


@pytest.mark.parametrize(
    "pattern, path, expected",
    [
        ("/", "/", {}),
        ("/", "/x", None),
        ("/ping", "/ping", {}),
        ("/ping", "/ping/", {}),
        ("/ping", "//ping", None),
        ("/ping", "/Ping", None),
        ("/models/{m}", "/models/a", {"m": "a"}),
        ("/models/{m}", "/models", None),
        ("/models/{m}", "/models/a/b", None),
        ("/models/{m}/{v}", "/models//1.0", None),
        ("/models/{m}/{v}", "/models/a/1.0", {"m": "a", "v": "1.0"}),
        ("/models/{m}/{v}/set-default", "/models/a/1/set-default", {"m": "a", "v": "1"}),
        ("/models/{m}/{v}/set-default", "/models/a/1/other", None),
        ("/v1/models/{m}:predict", "/v1/models/a:predict", {"m": "a"}),
        ("/v1/models/{m}:predict", "/v1/models/a", None),
        ("/v1/models/{m}:predict", "/v1/models/:predict", None),
        ("/predictions/{m}/{v}/{rest...}", "/predictions/a/1/v1/chat", {"m": "a", "v": "1", "rest": "v1/chat"}),
        ("/predictions/{m}/{v}/{rest...}", "/predictions/a/1", None),
        ("/{m}/predict", "/a/predict", {"m": "a"}),
        ("/{m}/predict", "/a/b", None),
    ],
)
def test_pattern_matches_paths_and_names_their_parts(pattern: str, path: str, expected: dict[str, str] | None) -> None:
    assert Route(ANY, pattern, echo).match(Request("GET", path).segments) == expected


ROWS = [
    ("OPTIONS", "/", echo),
    ("GET", "/models", echo),
    ("POST", "/models", echo),
    ("PUT", "/models/{m}", echo),
    (ANY, "/predictions/{m}", echo),
    ("OPTIONS", "/predictions/{m}", lambda exchange, m: Response(200, b"described")),
    (ANY, "/{m}/predict", echo),
]


@pytest.mark.parametrize(
    "method, path, status, allow",
    [
        ("GET", "/models", 200, ""),
        ("HEAD", "/models", 200, ""),
        ("POST", "/models/", 200, ""),
        ("DELETE", "/models", 405, "GET, HEAD, POST"),
        ("GET", "/models/a", 405, "PUT"),
        ("HEAD", "/models/a", 405, "PUT"),
        ("GET", "/", 405, "OPTIONS"),
        ("OPTIONS", "*", 200, ""),
        ("PATCH", "/predictions/a", 200, ""),
        ("GET", "/a/predict", 200, ""),
        ("GET", "/nowhere", 404, ""),
        ("GET", "/models/a/b/c", 404, ""),
        ("GET", "//models", 404, ""),
    ],
)
def test_unknown_path_is_404_and_wrong_method_405_with_allow(method: str, path: str, status: int, allow: str) -> None:
    response = ask(Router(ROWS), method, path)
    assert response.status == status
    assert response.headers.get("Allow", "") == allow
    kind = {404: "ResourceNotFoundException", 405: "MethodNotAllowedException"}
    if status in kind:
        assert error_of(response)["type"] == kind[status]
        assert error_of(response)["message"].endswith("please refer to API document.")


def test_listed_method_wins_over_any_method_whatever_the_order() -> None:
    assert ask(Router(ROWS), "OPTIONS", "/predictions/a").body == b"described"
    assert ask(Router(ROWS), "POST", "/predictions/a").body == b'["POST", {"m": "a"}]'


@pytest.mark.parametrize(
    "error, status, kind, message",
    [
        (ModelNotFoundError("Model not found: x"), 404, "ModelNotFoundException", "Model not found: x"),
        (HandlerError("Prediction failed"), 503, "InternalServerException", "Prediction failed"),
        (KeyError("/secret/path"), 500, "InternalServerException", "Internal error"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_error_becomes_an_answer_with_the_request_id(
    error: Exception, status: int, kind: str, message: str, is_async: bool
) -> None:
    async def fail_later(exchange: Exchange) -> Response:
        await asyncio.sleep(0)
        raise error

    router = Router([(ANY, "/x", fail_later if is_async else failing(error))])
    response = ask(router, "GET", "/x")
    assert error_of(response) == {
        "code": status, "type": kind, "message": message, "detail": {"request_id": "an-id"},
    }  # fmt: skip
    assert response.status == status
    assert b"secret" not in bytes(response.body)


def test_unforeseen_error_is_logged_once_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        ask(Router([(ANY, "/x", failing(KeyError("why")))]), "GET", "/x")
        ask(Router([(ANY, "/x", failing(BadRequestError("no")))]), "GET", "/x")
    [record] = [record for record in caplog.records if record.name == "pyserve.api.routes"]
    assert "an-id" in record.getMessage()
    assert record.exc_info is not None and "why" in str(record.exc_info[1])


def test_headers_of_an_error_are_sent() -> None:
    error = OverloadedError("full", detail={"reason": "queue full"}, headers={"Retry-After": "2"})
    response = ask(Router([(ANY, "/x", failing(error))]), "GET", "/x")
    assert response.headers == {"Retry-After": "2"}
    assert error_of(response)["detail"] == {"reason": "queue full", "request_id": "an-id"}


def test_detail_can_be_left_out_or_kept_from_strangers() -> None:
    rows = [(ANY, "/x", failing(HandlerError("no", detail={"text": "in /home/x.py", "where": "x.py:1", "n": 1})))]
    public = error_of(ask(Router(rows, error_format=ErrorFormat(with_private_detail=False)), "GET", "/x"))
    assert public["detail"] == {"n": 1, "request_id": "an-id"}
    assert public["code"] == 503
    assert "detail" not in error_of(ask(Router(rows, error_format=ErrorFormat(with_detail=False)), "GET", "/x"))


def test_endpoint_that_returns_none_answers_later() -> None:
    kept: list[Exchange] = []
    router = Router([(ANY, "/x", kept.append)])
    exchange, answers = exchange_for("GET", "/x")
    router(exchange)
    assert not answers and not router.tasks
    kept[0].respond(Response(204))
    assert [answer.status for answer in answers] == [204]


def test_async_endpoint_is_kept_until_done_and_answers_even_when_cancelled() -> None:
    async def run() -> Response:
        async def wait(exchange: Exchange) -> Response:
            await asyncio.Event().wait()
            return Response()

        router = Router([(ANY, "/x", wait)])
        exchange, answers = exchange_for("GET", "/x")
        router(exchange)
        [task] = router.tasks
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not router.tasks
        [answer] = answers
        return answer

    assert asyncio.run(run()).status == 503


def test_every_answer_of_the_router_is_counted() -> None:
    statuses: list[int] = []

    async def later(exchange: Exchange) -> Response:
        return Response(202)

    router = Router([*ROWS, (ANY, "/later", later)], on_answer=statuses.append)
    for path in ("/models", "/later", "/nowhere"):
        ask(router, "GET", path)
    assert statuses == [200, 202, 404]


LOOPBACK = Address("127.0.0.1", 8081)


@pytest.mark.parametrize(
    "host, allowed",
    [
        ("127.0.0.1:8081", True), ("localhost:8081", True), ("LOCALHOST", True), ("localhost.", True),
        ("pyserve.localhost:80", True), ("[::1]:8081", True), ("127.1.2.3", True), ("", True),
        ("evil.example:8081", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example", False),
        ("192.168.0.7:8081", False), ("0.0.0.0:8081", False), ("[::1", False), ("evil@127.0.0.2.example", False),
    ],
)  # fmt: skip
def test_loopback_listener_answers_only_for_loopback_names(host: str, allowed: bool) -> None:
    router = Router(protected(ROWS, None, "management", BrowserGuard(LOOPBACK)))
    response = ask(router, "GET", "/models", {"Host": host})
    assert response.status == (200 if allowed else 403)
    if not allowed:
        assert error_of(response)["type"] == "BadRequestException"


@pytest.mark.parametrize("address", [Address("0.0.0.0", 8081), Address("10.0.0.1", 8081), Address(path="/run/x.sock")])
def test_host_is_not_checked_where_browsers_elsewhere_may_ask(address: Address) -> None:
    router = Router(protected(ROWS, None, "management", BrowserGuard(address)))
    assert ask(router, "POST", "/models", {"Host": "models.example"}).status == 200


@pytest.mark.parametrize(
    "method, origin, allowed_origin, status",
    [
        ("POST", "", "", 200),
        ("POST", "http://localhost:8081", "", 200),
        ("POST", "https://localhost:8081", "", 200),
        ("POST", "http://localhost:9999", "", 403),
        ("POST", "http://evil.example", "", 403),
        ("POST", "null", "", 403),
        ("POST", "http://evil.example", "*", 403),
        ("POST", "https://ui.example", "https://ui.example", 200),
        ("POST", "https://ui.example.evil", "https://ui.example", 403),
        ("POST", "HTTPS://UI.example", "https://ui.example", 200),
        ("POST", "http://LOCALHOST:8081", "", 200),
        ("POST", "http://localhost", "", 403),
        ("POST", "file://", "", 403),
        ("PUT", "http://evil.example", "", 403),
        ("DELETE", "http://evil.example", "", 403),
        ("GET", "http://evil.example", "", 200),
    ],
)
def test_other_origins_make_no_changes(method: str, origin: str, allowed_origin: str, status: int) -> None:
    rows = [("GET POST PUT DELETE", "/models", echo)]
    headers = {"Host": "localhost:8081", "content-type": "text/plain", **({"Origin": origin} if origin else {})}
    router = Router(protected(rows, None, "management", BrowserGuard(LOOPBACK, [allowed_origin])))
    assert ask(router, method, "/models", headers).status == status


@pytest.mark.parametrize("path", ["//models/a", "/models//a", "/models/a//b", "//a/predict", "/v1/models/:predict"])
def test_an_empty_segment_is_no_name(path: str) -> None:
    patterns = ("/models/{name}", "/models/{name}/{version}", "/{name}/predict", "/v1/models/{name}:predict")
    router = Router([("GET", pattern, echo) for pattern in patterns])
    assert ask(router, "GET", path).status == 404
    assert ask(router, "GET", f"{path}/").status == 404


def test_a_request_without_a_host_is_of_no_page() -> None:
    router = Router(protected([("POST", "/models", echo)], None, "management", BrowserGuard(LOOPBACK)))
    assert [ask(router, "POST", "/models", {"Origin": each}).status for each in ("", "http://", "http://a")] == [
        200, 403, 403,
    ]  # fmt: skip


def test_nothing_stands_before_an_endpoint_that_nothing_has_to_protect() -> None:
    assert all(row[2] is own[2] for row, own in zip(protected(ROWS, None, "inference"), ROWS, strict=True))


def test_preflight_is_answered_only_where_cors_is_configured() -> None:
    asked = {"Origin": "https://ui.example", "Access-Control-Request-Method": "PUT"}
    cors = Cors(Config(cors_allowed_origin="https://ui.example"))
    assert ask(Router(ROWS, cors=cors), "OPTIONS", "/models/a", asked).status == 200
    assert ask(Router(ROWS), "OPTIONS", "/models/a", asked).status == 405
    assert ask(Router(ROWS, cors=cors), "OPTIONS", "/nowhere", asked).status == 404
    assert ask(Router(ROWS, cors=Cors(Config())), "OPTIONS", "/models/a", asked).status == 405


@pytest.mark.parametrize(
    "method, path, status, content_type",
    [
        ("GET", "/metrics", 200, "text/plain; version=0.0.4; charset=utf-8"),
        ("POST", "/metrics/x/y", 200, "text/plain; version=0.0.4; charset=utf-8"),
        ("OPTIONS", "/", 200, "application/json"),
        ("GET", "/api-description", 200, "application/json"),
        ("GET", "/", 405, "application/json"),
        ("GET", "/models", 404, "application/json"),
    ],
)
def test_metrics_listener_answers_metrics_and_its_description(
    method: str, path: str, status: int, content_type: str
) -> None:
    response = ask(Router(metrics_routes(Metrics())), method, path)
    assert (response.status, response.content_type) == (status, content_type)
    if method == "OPTIONS":
        assert list(json.loads(bytes(response.body))["paths"]) == ["/", "/api-description", "/metrics"]


def test_inference_listener_describes_itself_and_its_models() -> None:
    def find(name: str, version: str | None) -> None:
        if name != "m":
            raise ModelNotFoundError(f"Model not found: {name}")

    rows = [
        (ANY, "/ping", echo), (ANY, "/predictions/{model_name}", echo),
        (ANY, "/predictions/{model_name}/{model_version}", echo),
    ]  # fmt: skip
    router = Router([*rows, *inference_descriptions(rows, find)])
    document = json.loads(bytes(ask(router, "OPTIONS", "/").body))
    assert list(document["paths"]) == [
        "/", "/api-description", "/ping", "/predictions/{model_name}", "/predictions/{model_name}/{model_version}",
    ]  # fmt: skip
    assert ask(router, "POST", "/api-description").status == 200
    for path in ("/predictions/m", "/predictions/m/1.0"):
        of_model = json.loads(bytes(ask(router, "OPTIONS", path).body))
        assert of_model["info"]["title"] == "RESTful API for: m"
    assert ask(router, "OPTIONS", "/predictions/x").status == 404
    assert ask(router, "GET", "/predictions/x").body == b'["GET", {"model_name": "x"}]'
