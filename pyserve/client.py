"""A client of a server: arrays of numpy and torch in and out, and what the management API can do.

    client = pyserve.Client("http://127.0.0.1:8080")
    scores = client.predict("net", np.zeros((2, 3, 224, 224), np.float32))      # [2, classes], a numpy array
    labels = client.predict("cats", Path("kitten.jpg"))                          # what the handler answers, from JSON

Arrays go as binary tensors of the Open Inference Protocol, in both directions, without a detour through text. Importing
this imports neither torch nor numpy.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import socket
import ssl
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from pyserve.client_calls import (
    JSON_SIZE_HEADER,
    AnswerError,
    answer_error,
    arrays_in,
    by_name,
    input_names,
    json_or_bytes,
    plain_call,
    quoted,
    tensor_answer,
    tensor_call,
    tensor_path,
)

if TYPE_CHECKING:
    from pyserve.client_calls import Answer

__all__ = ["AnswerError", "AsyncClient", "Client"]

TIMEOUT_S = 120.0
NOT_UNDERSTOOD = 400
_REGISTERED = re.compile(r'Model "(.*)" Version: (.*) registered with ', re.DOTALL)


class Client:
    """A server. Any thread; each has a connection of its own, which is kept.

    Args:
        url: where it answers predictions: ``http://host:8080``, ``https://host``, ``https://host/beneath/a/path`` of a
            proxy, or ``unix:/path``.
        management: where it is managed; by default the same host and the next port.
        token: shown with predictions; ``management_token`` with the others. By default ``$PYSERVE_TOKEN`` is, with all.
        timeout_s: of each wait for the server.
        verify: whether the certificate of an https:// URL is checked.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8080", *, management: str | None = None, token: str = "",
        management_token: str = "", timeout_s: float = TIMEOUT_S, verify: bool = True,
    ):  # fmt: skip
        self.url = url.rstrip("/")
        self.management_url = (management or _next_port(self.url)).rstrip("/")
        usual = os.environ.get("PYSERVE_TOKEN", "")
        self._keys = {self.url: token or usual, self.management_url: management_token or token or usual}
        self._timeout_s = timeout_s
        self._verify = verify
        self._local = threading.local()
        self._opened: list[http.client.HTTPConnection] = []
        self._names: dict[str, list[str]] = {}

    # --- predictions ----------------------------------------------------------------------------------------------

    def predict(self, model: str, inputs: Any, *, version: str | None = None, outputs: Sequence[str] = ()) -> Answer:
        """The model's answer.

        Args:
            inputs: an array of numpy or torch with the batch as its first dimension; of a model with several inputs a
                sequence of them, or a dict by name. Or a file as a `pathlib.Path`, or bytes, sent as they are; or
                anything else that fits JSON, sent as that.
            outputs: names of those that are wanted of arrays; by default all.

        Returns:
            Of arrays: an array, or a dict of them by name if there are several outputs; torch.Tensor (on the CPU) if a
            torch.Tensor was sent, else numpy.ndarray. Otherwise the answer's JSON, or its bytes if it is none.

        Raises:
            AnswerError: the server says why not.
            OSError: it cannot be reached.
        """
        arrays = arrays_in(inputs)
        if arrays is None:
            call = plain_call(model, inputs, version)
            return json_or_bytes(self._ask("POST", self.url, *call)[0])
        path = tensor_path(model, version)
        if isinstance(arrays, dict):
            return self._tensors(path, arrays, outputs)
        known = self._names.get(path, [])
        if len(known) == len(arrays) == 1:  # of several inputs another version may have another order: asked each time
            try:
                return self._tensors(path, by_name(path, known, arrays), outputs)
            except AnswerError as error:
                if error.status != NOT_UNDERSTOOD:
                    raise
                if self._ask_names(path, 1) == known:
                    raise
        names = self._ask_names(path, len(arrays))
        return self._tensors(path, by_name(path, names, arrays), outputs)

    def _tensors(self, path: str, named: dict[str, Any], outputs: Sequence[str]) -> Answer:
        body, answered = self._ask("POST", self.url, *tensor_call(path, named, outputs))
        return tensor_answer(body, answered.get(JSON_SIZE_HEADER.lower(), ""), named)

    def _ask_names(self, path: str, count: int) -> list[str]:
        """Of the inputs, as the model has them; where it has none for them, ``count`` made ones."""
        names = self._names[path] = input_names(self._ask("GET", self.url, path)[0], count)
        return names

    def is_ready(self) -> bool:
        """Whether the server answers, and all of its models have workers."""
        try:
            self._ask("GET", self.url, "/v2/health/ready")
        except (AnswerError, OSError):
            return False
        return True

    # --- management -----------------------------------------------------------------------------------------------

    def models(self) -> dict[str, list[dict[str, Any]]]:
        """Every model by name, with the descriptions of its versions, the default one first."""
        names: list[str] = []
        token = ""
        while True:
            page = self._manage("GET", f"/models?limit=100{token}")
            names += [str(each["modelName"]) for each in page["models"]]
            if not page["models"] or "nextPageToken" not in page:
                break
            token = f"&next_page_token={quote(str(page['nextPageToken']))}"
        return {name: self.versions(name) for name in names}

    def versions(self, model: str) -> list[dict[str, Any]]:
        """The descriptions of a model's versions, the default one first."""
        default = self._manage("GET", f"/models/{quoted(model)}")[0]["modelVersion"]
        found: list[dict[str, Any]] = self._manage("GET", f"/models/{quoted(model)}/all")
        return sorted(found, key=lambda each: each["modelVersion"] != default)

    def register(self, url: str, *, name: str | None = None, workers: int = 1, **parameters: Any) -> tuple[str, str]:
        """Loads a model from the model store, or from a URL that the server allows; returns when it can be asked.

        Args:
            url: the file's name in the model store, or a URL.
            parameters: others of ``POST /models``, such as ``batch_size=8`` or ``handler="tensor"``.

        Returns:
            Its name and version.
        """
        query = {"url": url, "initial_workers": workers, "synchronous": "true", **parameters}
        if name is not None:
            query["model_name"] = name
        said = str(self._manage("POST", f"/models?{urlencode(query)}").get("status", ""))
        found = _REGISTERED.match(said)
        return (found[1], found[2]) if found else (name or "", "")

    def scale(self, model: str, workers: int, *, version: str | None = None, **parameters: Any) -> str:
        """Gives a model so many workers, and returns when they are there. What the server says."""
        query = urlencode({"min_worker": workers, "max_worker": workers, "synchronous": "true", **parameters})
        said = self._manage("PUT", f"{_model_path(model, version)}?{query}")
        return str(said.get("status", ""))

    def set_default(self, model: str, version: str) -> str:
        """Requests without a version go to this one from now on. What the server says."""
        return str(self._manage("PUT", f"{_model_path(model, version)}/set-default").get("status", ""))

    def unregister(self, model: str, version: str | None = None) -> str:
        """Finishes what a version has accepted, and removes it. What the server says."""
        return str(self._manage("DELETE", _model_path(model, version)).get("status", ""))

    def deploy(self, url: str, *, name: str | None = None, workers: int | None = None, **parameters: Any) -> str:
        """Replaces the served version of a model: loads the new one, makes it the default, removes the old one. While
        it loads, and if it cannot be loaded, nothing changes.

        Args:
            workers: of the new version; by default as many as the old one has.

        Returns:
            The new version.
        """
        before = self.models()
        old = before.get(name, [None])[0] if name is not None else None
        if workers is None:
            workers = max(1, int(old["minWorkers"])) if old else 1
        is_named = name is not None
        name, version = self.register(url, name=name, workers=workers, **parameters)
        old = before.get(name, [None])[0]
        if old is not None:
            if not is_named and int(old["minWorkers"]) > workers:
                self.scale(name, int(old["minWorkers"]), version=version)
            self.set_default(name, version)
            self.unregister(name, str(old["modelVersion"]))
        self._names.clear()
        return version

    def _manage(self, method: str, path: str) -> Any:
        body, _ = self._ask(method, self.management_url, path, b"" if method != "GET" else None)
        return json.loads(body)

    # --- HTTP -----------------------------------------------------------------------------------------------------

    def _ask(
        self, method: str, url: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[bytes, dict[str, str]]:
        key = self._keys[url]
        path = _prefix(url) + path
        sent = {**({"Authorization": f"Bearer {key}"} if key else {}), **(headers or {})}
        for is_last in (False, True):
            connection, is_kept = self._connection(url)
            try:
                connection.request(method, path, body, sent)
                answer = connection.getresponse()
                content = answer.read()
                break
            except (http.client.RemoteDisconnected, ConnectionError, http.client.CannotSendRequest):
                connection.close()
                if is_last or not is_kept:  # a kept one may have been closed by the server meanwhile: nothing was run
                    raise
            except BaseException:
                connection.close()
                raise
        if answer.status >= 400:
            raise answer_error(answer.status, answer.reason, content)
        return content, {name.lower(): value for name, value in answer.getheaders()}

    def _connection(self, url: str) -> tuple[http.client.HTTPConnection, bool]:
        """This thread's connection to ``url``, and whether it was used before."""
        kept: dict[str, http.client.HTTPConnection] = self._local.__dict__.setdefault("kept", {})
        if url not in kept:
            kept[url] = _Connection(url, self._timeout_s, self._verify)
            self._opened.append(kept[url])
        return kept[url], kept[url].sock is not None

    def close(self) -> None:
        """Closes the connections of all threads, none of which may be in a call. A further call opens one again."""
        for each in self._opened:
            each.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """`Client` for coroutines: its methods of the same names, awaited. Calls run in threads, so that many may wait.

    Args: as for `Client`.
    """

    def __init__(self, url: str = "http://127.0.0.1:8080", **arguments: Any):
        self._client = Client(url, **arguments)

    async def predict(
        self, model: str, inputs: Any, *, version: str | None = None, outputs: Sequence[str] = ()
    ) -> Answer:
        return await asyncio.to_thread(self._client.predict, model, inputs, version=version, outputs=outputs)

    async def is_ready(self) -> bool:
        return await asyncio.to_thread(self._client.is_ready)

    async def models(self) -> dict[str, list[dict[str, Any]]]:
        return await asyncio.to_thread(self._client.models)

    async def versions(self, model: str) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self._client.versions, model)

    async def register(
        self, url: str, *, name: str | None = None, workers: int = 1, **parameters: Any
    ) -> tuple[str, str]:
        return await asyncio.to_thread(self._client.register, url, name=name, workers=workers, **parameters)

    async def scale(self, model: str, workers: int, *, version: str | None = None, **parameters: Any) -> str:
        return await asyncio.to_thread(self._client.scale, model, workers, version=version, **parameters)

    async def set_default(self, model: str, version: str) -> str:
        return await asyncio.to_thread(self._client.set_default, model, version)

    async def unregister(self, model: str, version: str | None = None) -> str:
        return await asyncio.to_thread(self._client.unregister, model, version)

    async def deploy(self, url: str, *, name: str | None = None, workers: int | None = None, **parameters: Any) -> str:
        return await asyncio.to_thread(self._client.deploy, url, name=name, workers=workers, **parameters)

    async def close(self) -> None:
        """Closes the connections; no call may be under way."""
        self._client.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Connection(http.client.HTTPConnection):
    """HTTP to a URL, unix sockets and TLS included."""

    def __init__(self, url: str, timeout_s: float, verify: bool):
        self._path = url.removeprefix("unix:") if url.startswith("unix:") else ""
        parts = urlsplit("http://localhost" if self._path else url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a server; write http://host:port, https://host or unix:/path")
        self._context = None
        if parts.scheme == "https":
            self._context = ssl.create_default_context() if verify else ssl._create_unverified_context()
        super().__init__(parts.hostname, parts.port or (443 if self._context else 80), timeout=timeout_s)

    def connect(self) -> None:
        if self._path:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._path)
            return
        super().connect()
        if self._context is not None:
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)


def _next_port(url: str) -> str:
    parts = urlsplit(url)
    if url.startswith("unix:") or parts.port is None:
        return url
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port + 1}{parts.path}"


def _prefix(url: str) -> str:
    """Of all paths, where a proxy has the server beneath one."""
    return "" if url.startswith("unix:") else urlsplit(url).path


def _model_path(model: str, version: str | None) -> str:
    return f"/models/{quoted(model)}" + (f"/{quoted(version)}" if version else "")
