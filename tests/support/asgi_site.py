"""The ASGI applications of an engine in this process, asked as a server of its own is (tests/support/serving.py): for
tests that are for both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import uvloop

import pyserve.asgi
from pyserve.embedding.engine import EmbeddedServer
from tests.support.asking import LIMIT_S, Answer, Asking, AskingClient
from tests.support.raw_http import Raw, request
from tests.support.serving import Server

T = TypeVar("T")

# A handler of one's own: the size of what it is sent; or parts, without end, or after a file has gone.
OWN = """
import os
import time

from ts.handler_utils.utils import send_intermediate_predict_response


def handle(data, context):
    if data is None:
        return None
    body = data[0].get("body")
    if not isinstance(body, dict):
        return [str(len(body or b""))]
    for part in body.get("parts", []):
        if part == "raise":
            raise ValueError("cut off")
        send_intermediate_predict_response([part], context.request_ids, "", 200, context)
    for number in range(body.get("endless", 0)):
        send_intermediate_predict_response(["x" * 1000], context.request_ids, "", 200, context)
        time.sleep(0.01)
    if "hold" in body:
        open(body["hold"] + ".begun", "w").close()
        while os.path.exists(body["hold"]):
            time.sleep(0.01)
    return ["end"]
"""


class LoopThread:
    """An event loop that runs in a thread of its own; a context."""

    def __init__(self, new_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop):
        self.loop = new_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """What ``call`` returns there."""
        return asyncio.run_coroutine_threadsafe(call, self.loop).result(LIMIT_S)

    def __enter__(self) -> LoopThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(LIMIT_S)
        self.loop.close()


@contextlib.contextmanager
def own_environment() -> Iterator[None]:
    """Afterwards environment variables are as they were."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def scope_of(data: bytes, **more: Any) -> tuple[dict[str, Any], list[bytes]]:
    """The ASGI scope of a request as it is on the wire, and its body in the pieces in which it was sent."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    method, target, version = first.split(b" ")
    if target.startswith(b"http://"):
        target = b"/" + target.split(b"/", 3)[3]
    headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
    pieces = [body]
    if (b"transfer-encoding", b"chunked") in headers:
        pieces = []
        while body:
            size, _, body = body.partition(b"\r\n")
            pieces.append(body[: int(size, 16)])
            body = body[int(size, 16) + 2 :]
    path, _, query = target.partition(b"?")
    from urllib.parse import unquote_to_bytes

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": version.decode().removeprefix("HTTP/"),
        "method": method.decode(), "path": unquote_to_bytes(path).decode("utf-8", "replace"), "raw_path": path,
        "query_string": query, "root_path": "", "headers": headers, "client": ("127.0.0.1", 1234), "scheme": "http",
        "server": ("localhost", 80), **more,
    }  # fmt: skip
    return scope, pieces


async def call(
    app: Callable[..., Awaitable[None]], scope: dict[str, Any], pieces: Sequence[bytes],
    *, gone: asyncio.Event | None = None,
) -> tuple[int, list[tuple[str, str]], list[bytes]]:  # fmt: skip
    """Status, headers and parts of the answer.

    Args:
        gone: set when the client hangs up.
    """
    sent: list[dict[str, Any]] = []
    left = list(pieces)
    gone = gone or asyncio.Event()

    async def receive() -> dict[str, Any]:
        if left:
            body = left.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(left)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    if not sent:
        return 0, [], []
    assert sent[0]["type"] == "http.response.start" and not sent[-1].get("more_body", False)
    assert all(type(each["body"]) is bytes for each in sent[1:])
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in sent[0]["headers"]]
    return sent[0]["status"], headers, [each["body"] for each in sent[1:] if each["body"]]


class AsgiSite(Asking):
    """An engine and its two applications, with the methods of `tests.support.serving.Server` that ask.

    Management needs no key, and models may be registered, as at a server that listens on loopback.
    """

    def __init__(self, folder: Path, config: dict[str, Any] | None = None):
        self.store = folder / "store"
        self.store.mkdir(exist_ok=True)
        self._config = {
            "model_store": self.store, "enable_model_api": True, "disable_token_authorization": True,
            "error_detail": "full", **(config or {}),
        }  # fmt: skip
        self._stack = contextlib.ExitStack()

    def start(self, *arguments: str) -> None:
        """Takes ``--models`` as the command does."""
        models = list(arguments[arguments.index("--models") + 1 :]) if "--models" in arguments else []
        self._stack.enter_context(own_environment())
        self.thread = self._stack.enter_context(LoopThread())
        self.engine = EmbeddedServer(models, config=self._config)
        self.thread.run(self.engine.start())
        inference = pyserve.asgi.application(self.engine)
        self.apps = {
            "inference": inference, "metrics": inference, "management": pyserve.asgi.management(self.engine),
        }  # fmt: skip

    def stop(self) -> None:
        with self._stack:
            self.thread.run(self.engine.stop())

    @property
    def process(self) -> psutil.Process:
        """That the models are in."""
        return psutil.Process()

    def exchange(self, data: bytes, port: str = "inference") -> Raw:
        scope, pieces = scope_of(data)
        status, headers, parts = self.thread.run(call(self.apps[port], scope, pieces))
        return Raw("HTTP/1.1", status, "", headers, b"".join(parts), False)

    def __enter__(self) -> AsgiSite:
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "thread"):
            self.stop()

    def client(self, name: str = "inference") -> _Client:
        return _Client(self, name)


def new_site(transport: str, folder: Path, config: dict[str, Any] | None = None) -> Any:
    """A server, not started: for ``sockets`` a process of its own, for ``asgi`` an engine in this one. Both are asked
    in the same way, see `tests.support.raw_http.exchange`."""
    if transport == "asgi":
        return AsgiSite(folder, config)
    server = Server(folder)
    server.environment |= {f"PYSERVE_{key.upper()}": str(value).lower() for key, value in (config or {}).items()}
    return server


def needs_sockets(server: Any) -> None:
    """Skips a test of what is on the wire, where there is none."""
    if not isinstance(server, Server):
        pytest.skip("of bytes on the wire, which are the ASGI server's")


class _Client(AskingClient):
    def __init__(self, site: AsgiSite, port: str):
        self._site = site
        self._port = port

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        lines = [f"{name}: {value}" for name, value in (headers or {}).items()]
        found = self._site.exchange(request(method, path, body or b"", *lines), self._port)
        return Answer(found.status, {name.lower(): value for name, value in found.headers}, found.body)
