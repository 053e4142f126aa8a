"""An ASGI application as servers and other applications use it: streams, hang-ups, lifespan, mounting, keys."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

import pyserve
import pyserve.asgi
from pyserve.embedding.http_call import AbortedAnswerError
from pyserve.embedding.http_scope import asked_target, client_of
from tests.support.asgi_site import OWN, AsgiSite, LoopThread, call, own_environment, scope_of
from tests.support.handler_archives import write_handler
from tests.support.raw_http import request
from tests.support.serving import LIMIT_S
from tests.support.serving_models import write_linear


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsgiSite]:
    site = AsgiSite(tmp_path_factory.mktemp("application"))
    write_linear(site.store)
    write_handler(site.store, "own", OWN)
    site.start("--models", "all")
    try:
        yield site
    finally:
        site.stop()


@contextlib.asynccontextmanager
async def http_client(app: Any, **more: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, **more)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- without a port ---------------------------------------------------------------------------------------------------


def test_it_is_asked_without_a_port(site: AsgiSite) -> None:
    async def ask() -> None:
        async with http_client(site.apps["inference"]) as client:
            assert (await client.get("/ping")).json() == {"status": "Healthy"}
            assert len((await client.post("/predictions/linear", json=[1, 2, 3, 4])).json()) == 3
            assert (await client.head("/ping")).content == b""
            missing = await client.post("/predictions/none")
            assert (missing.status_code, missing.json()["type"]) == (404, "ModelNotFoundException")

            async def parts() -> AsyncIterator[bytes]:
                for _ in range(5):
                    yield b"ab"

            assert (await client.post("/predictions/own", content=parts())).text == "10"

    site.thread.run(ask())


def test_a_body_without_any_framing_is_read(site: AsgiSite) -> None:
    """As HTTP/2 may send one."""
    scope, _ = scope_of(request("POST", "/predictions/own"), http_version="2")
    assert not [name for name, _ in scope["headers"] if name == b"content-length"]
    _, _, parts = site.thread.run(call(site.apps["inference"], scope, [b"abc", b"", b"de"]))
    assert parts == [b"5"]
    _, _, parts = site.thread.run(call(site.apps["inference"], scope, [b""]))
    assert parts == [b"0"]


def test_a_body_shorter_than_announced_is_refused(site: AsgiSite) -> None:
    scope, _ = scope_of(request("POST", "/predictions/own", b"abcdef"))
    status, _, _ = site.thread.run(call(site.apps["inference"], scope, [b"abc"]))
    assert status == 400
    assert not site.engine.running.server.bodies.size


# --- streams ----------------------------------------------------------------------------------------------------------


def order(text: str) -> bytes:
    return request("POST", "/predictions/own", text.encode(), "Content-Type: application/json")


def test_parts_leave_one_by_one(site: AsgiSite) -> None:
    scope, pieces = scope_of(order('{"parts": ["one", "two"]}'))
    status, headers, parts = site.thread.run(call(site.apps["inference"], scope, pieces))
    assert (status, parts) == (200, [b"one", b"two", b"end"])
    assert ("ts_stream_next", "true") in headers and "transfer-encoding" not in dict(headers)


def test_an_answer_that_breaks_off_does_not_end_as_if_it_were_whole(site: AsgiSite) -> None:
    scope, pieces = scope_of(order('{"parts": ["one", "raise"]}'))
    with pytest.raises(AbortedAnswerError, match="ends before it is complete"):
        site.thread.run(call(site.apps["inference"], scope, pieces))


def test_a_client_that_hangs_up_ends_its_stream(site: AsgiSite) -> None:
    scope, pieces = scope_of(order('{"endless": 200}'))
    sent: list[Any] = []

    async def ask() -> None:
        gone = asyncio.Event()
        left = list(pieces)

        async def receive() -> dict[str, Any]:
            if left:
                return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 4:
                gone.set()

        await site.apps["inference"](scope, receive, send)

    site.thread.run(ask())
    assert not any(message.get("more_body") is False for message in sent)
    assert site.ask("POST", "/predictions/own", b"the worker is free again").body == b"24"


def test_a_client_that_hangs_up_takes_its_request_along(site: AsgiSite, tmp_path: Path) -> None:
    hold, second = tmp_path / "hold", tmp_path / "second"
    hold.touch()

    async def ask() -> None:
        gone = asyncio.Event()
        app = site.apps["inference"]
        first = asyncio.ensure_future(call(app, *scope_of(order(f'{{"hold": "{hold}"}}'))))
        await asyncio.to_thread(wait_for, Path(f"{hold}.begun"))
        waiting = asyncio.ensure_future(call(app, *scope_of(order(f'{{"hold": "{second}"}}')), gone=gone))
        await asyncio.sleep(0.05)
        gone.set()
        assert await waiting == (0, [], [])  # nothing is sent to nobody
        cancelled = asyncio.ensure_future(call(app, *scope_of(order(f'{{"hold": "{second}"}}'))))
        await asyncio.sleep(0.05)
        cancelled.cancel()  # as hypercorn does
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        hold.unlink()
        assert (await first)[0] == 200

    site.thread.run(ask())
    assert site.ask("POST", "/predictions/own", b"x").status == 200
    assert not Path(f"{second}.begun").exists(), "it was run all the same"
    assert not site.engine.running.server.bodies.size


def test_a_reader_that_does_not_read_is_given_up(site: AsgiSite) -> None:
    scope, pieces = scope_of(order('{"endless": 200}'))
    running = site.engine.running
    connections = running.listener(("inference", "metrics"))[1]
    limits = connections.limits

    async def ask() -> None:
        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.sleep(LIMIT_S)

        left = list(pieces)

        async def receive() -> dict[str, Any]:
            if left:
                return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
            return await asyncio.Future()

        object.__setattr__(connections, "limits", type(limits)(body_size_max=100_000, stream_backlog_max=20_000))
        try:
            task = asyncio.ensure_future(site.apps["inference"](scope, receive, send))
            await asyncio.sleep(1)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        finally:
            connections.limits = limits

    site.thread.run(ask())
    assert site.ask("POST", "/predictions/own", b"x").body == b"1"


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_slow_body_is_given_up(site: AsgiSite) -> None:
    connections = site.engine.running.listener(("inference", "metrics"))[1]
    limits = connections.limits

    async def ask() -> list[Any]:
        scope, _ = scope_of(request("POST", "/predictions/own", b"abc"))
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return await asyncio.Future()

        async def send(message: Any) -> None:
            sent.append(message)

        connections.limits = type(limits)(body_stall_s=0.05)
        try:
            await site.apps["inference"](scope, receive, send)
        finally:
            connections.limits = limits
        return sent

    sent = site.thread.run(ask())
    assert sent[0]["status"] == 408 and b"paused for 0.05 s" in sent[1]["body"]
    assert not site.engine.running.server.bodies.size


def test_requests_beyond_the_limit_of_connections_are_refused(site: AsgiSite) -> None:
    connections = site.engine.running.listener(("inference", "metrics"))[1]
    limits = connections.limits
    connections.limits = type(limits)(connection_count_max=1)

    class Other:
        def drain(self) -> None: ...

        def abort(self) -> None: ...

    other = Other()
    try:
        assert connections.add(other) is None
        answer = site.ask("GET", "/ping")
        assert answer.status == 503 and "limit of 1 connections" in answer.json["message"]
    finally:
        connections.remove(other)
        connections.limits = limits
    assert site.ask("GET", "/ping").status == 200


def test_heads_that_no_server_should_pass_are_refused(site: AsgiSite) -> None:
    scope, pieces = scope_of(request("GET", "/ping"))
    scope["headers"].append((b"x-a", b"1\r\nx-b: 2"))
    assert site.thread.run(call(site.apps["inference"], scope, pieces))[0] == 400
    scope, pieces = scope_of(request("GET", "/ping"), method="GET /other HTTP/1.1\r\nx:")
    assert site.thread.run(call(site.apps["inference"], scope, pieces))[0] == 400


# --- where it is mounted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "path", "raw", "asked"),
    [
        ("", "/ping", b"/ping", b"/ping"),
        ("/api", "/api/ping", b"/api/ping", b"/ping"),
        ("/api/", "/api/ping", b"/api/ping", b"/ping"),
        ("/api", "/api", b"/api", b"/"),
        ("/api", "/ping", b"/ping", b"/ping"),  # the server has taken it away already
        ("/api", "/apiping", b"/apiping", b"/apiping"),
        ("/a b", "/a b/x%y", b"/a%20b/x%25y", b"/x%25y"),
        ("/a/b", "/a/b/c", b"/a%2Fb/c", b"/c"),
        ("/api", "/api/a/b", b"/api/a%2Fb", b"/a%2Fb"),
        ("", "/\u65e5", None, b"/%E6%97%A5"),
        ("/api", "/api/\u65e5", None, b"/%E6%97%A5"),
        ("", "/ping", b"/ping?a=1", b"/ping"),
    ],
)
def test_the_path_is_the_one_below_the_mount(root: str, path: str, raw: bytes | None, asked: bytes) -> None:
    assert asked_target({"root_path": root, "path": path, "raw_path": raw}) == asked


@pytest.mark.parametrize(
    ("client", "name"),
    [(("1.2.3.4", 5), "1.2.3.4:5"), (["::1", 5], "[::1]:5"), (None, "unix"), (("", 0), "unix"),
     (("a:b", 1), "unknown"), (("testclient", 50000), "testclient:50000"), (("fe80::1%eth0", 1), "[fe80::1%eth0]:1")],
)  # fmt: skip
def test_clients_are_named_as_those_of_sockets(client: Any, name: str) -> None:
    assert client_of({"client": client}) == name


def test_it_is_mounted_in_another_application(site: AsgiSite) -> None:
    host = Starlette(routes=[Mount("/models/v1", app=site.apps["inference"])])

    async def ask() -> None:
        async with http_client(host) as client:
            assert (await client.get("/models/v1/ping")).json() == {"status": "Healthy"}
            found = await client.post("/models/v1/predictions/linear", json=[1, 2, 3, 4])
            assert len(found.json()) == 3
            assert (await client.get("/models/v1/nowhere")).json()["type"] == "ResourceNotFoundException"

    site.thread.run(ask())


# --- its life ---------------------------------------------------------------------------------------------------------


async def live(app: Any, between: Any = None) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    started = asyncio.Event()
    ends = asyncio.Event()
    asked = iter(("startup", "shutdown"))

    async def receive() -> dict[str, Any]:
        kind = next(asked)
        if kind == "shutdown":
            await ends.wait()
        return {"type": f"lifespan.{kind}"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        started.set()

    task = asyncio.ensure_future(app({"type": "lifespan"}, receive, send))
    await started.wait()
    if between is not None:
        await between()
    ends.set()
    await task
    return sent


def test_the_lifespan_starts_and_stops_an_engine_of_its_own(site: AsgiSite) -> None:
    app = pyserve.asgi.application([site.store / "linear.mar"], config={"enable_metrics_api": False})

    async def between() -> None:
        assert app.engine.is_started
        async with http_client(app) as client:
            assert (await client.get("/ping")).status_code == 200
            assert (await client.get("/metrics")).status_code == 404

    async def run() -> None:
        async with http_client(app) as client:
            early = await client.get("/ping")
            assert early.status_code == 503 and "lifespan" in early.json()["detail"]["fix"]
        sent = await live(app, between)
        assert [each["type"] for each in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert not app.engine.is_started

    with own_environment():
        asyncio.run(run())


def test_the_lifespan_leaves_an_engine_that_runs_alone(site: AsgiSite) -> None:
    site.thread.run(live(site.apps["inference"]))
    site.thread.run(live(site.apps["management"]))
    assert site.engine.is_started and site.ask("GET", "/ping").status == 200


def test_a_start_that_fails_is_told_to_the_server(tmp_path: Path) -> None:
    async def run(app: Any) -> list[dict[str, Any]]:
        return await live(app)

    for app, message in (
        (pyserve.asgi.application(tmp_path / "nothing.mar"), "Model not found"),
        (pyserve.asgi.application([], config={"job_queue_size": "many"}), "job_queue_size"),
    ):
        with own_environment():
            (sent,) = asyncio.run(run(app))
        assert sent["type"] == "lifespan.startup.failed" and message in sent["message"]


def test_what_is_not_http_is_refused(site: AsgiSite) -> None:
    async def connect(extensions: dict[str, Any]) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await site.apps["inference"]({"type": "websocket", "path": "/", "extensions": extensions}, receive, send)
        return sent

    assert [each["type"] for each in site.thread.run(connect({}))] == ["websocket.close"]
    start, body = site.thread.run(connect({"websocket.http.response": {}}))
    assert start["status"] == 404 and b"ResourceNotFoundException" in body["body"]
    with pytest.raises(RuntimeError, match="'other'"):
        site.thread.run(site.apps["inference"]({"type": "other"}, None, None))  # type: ignore[arg-type]


def test_another_event_loop_is_named(site: AsgiSite) -> None:
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(call(site.apps["inference"], *scope_of(request("GET", "/ping"))))


def test_a_configuration_beside_an_engine_is_refused() -> None:
    with pytest.raises(TypeError, match="give config to the engine"):
        pyserve.asgi.application(pyserve.embedded(), config={})


# --- who may call what ------------------------------------------------------------------------------------------------


FAILS = """
def handle(data, context):
    if data is not None:
        raise ValueError("secret")
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoopThread, Any, Any]]:
    folder = tmp_path_factory.mktemp("guarded")
    write_linear(folder)
    write_handler(folder, "own", FAILS)
    with own_environment(), LoopThread() as thread:
        engine = pyserve.embedded([folder / "linear.mar", folder / "own.mar"], config={"model_store": folder})
        thread.run(engine.start())
        yield thread, engine, pyserve.asgi.management(engine)
        thread.run(engine.stop())


def ask(thread: LoopThread, app: Any, *arguments: Any) -> tuple[int, bytes]:
    status, _, parts = thread.run(call(app, *scope_of(request(*arguments))))
    return status, b"".join(parts)


def test_management_needs_a_key_unless_it_is_said_otherwise(guarded: tuple[LoopThread, Any, Any]) -> None:
    thread, engine, app = guarded
    assert ask(thread, app, "GET", "/models")[0] == 401
    key = f"Authorization: Bearer {engine.keys['management']}"
    assert ask(thread, app, "GET", "/models", b"", key)[0] == 200
    assert ask(thread, app, "DELETE", "/models/linear", b"", key)[0] == 405  # enable_model_api is off by itself
    assert set(thread.run(engine.models())) == {"linear", "own"}  # Python needs no key
    rotate = f"Authorization: Bearer {engine.keys['api']}"
    assert ask(thread, app, "GET", "/token?type=management", b"", rotate)[0] == 200
    assert ask(thread, app, "GET", "/models", b"", key)[0] == 401
    key = f"Authorization: Bearer {engine.keys['management']}"
    assert ask(thread, app, "GET", "/models", b"", key)[0] == 200


def test_strangers_are_not_shown_what_failed(guarded: tuple[LoopThread, Any, Any]) -> None:
    thread, engine, _ = guarded
    status, body = ask(thread, pyserve.asgi.application(engine), "POST", "/predictions/own", b"x")
    assert status == 503 and b"secret" not in body
    with pytest.raises(pyserve.AnswerError, match="secret"):
        thread.run(engine.predict("own", b"x"))


def test_inference_needs_a_key_where_that_is_asked_for(tmp_path: Path) -> None:
    write_linear(tmp_path)
    with own_environment(), LoopThread() as thread:
        config = {"disable_token_authorization": False, "model_control_on_inference": True, "model_store": tmp_path}
        engine = pyserve.embedded(tmp_path / "linear.mar", config=config)
        thread.run(engine.start())
        app = pyserve.asgi.application(engine)
        body = b"[1, 2, 3, 4]"
        json = "Content-Type: application/json"
        assert ask(thread, app, "POST", "/predictions/linear", body, json)[0] == 401
        key = f"Authorization: Bearer {engine.keys['inference']}"
        assert ask(thread, app, "POST", "/predictions/linear", body, json, key)[0] == 200
        assert ask(thread, app, "GET", "/ping")[0] == 200
        unload = "/v2/repository/models/linear/unload"
        assert ask(thread, app, "POST", unload, b"{}", key)[0] == 401
        assert len(thread.run(engine.predict("linear", [1, 2, 3, 4]))) == 3
        thread.run(engine.stop())
