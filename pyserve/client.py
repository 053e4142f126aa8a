"""A client of a server: arrays of numpy and torch in and out, and what the management API can do.

    client = pyserve.Client("http://127.0.0.1:8080")
    scores = client.predict("net", np.zeros((2, 3, 224, 224), np.float32))      # [2, classes], a numpy array
    labels = client.predict("cats", Path("kitten.jpg"))                          # what the handler answers, from JSON

Arrays go as binary tensors of the Open Inference Protocol, in both directions, without a detour through text. Importing
this imports neither torch nor numpy.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, Any] | torch.Tensor
    Answer = Array | dict[str, Array] | Any

TIMEOUT_S = 120.0
_JSON_SIZE_HEADER = "Inference-Header-Content-Length"
_DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "bfloat16": "BF16", "float32": "FP32",
    "float64": "FP64",
}  # fmt: skip
_DTYPES = {datatype: dtype for dtype, datatype in _DATATYPES.items()}
_REGISTERED = re.compile(r'Model "(.*)" Version: (.*) registered with ', re.DOTALL)


class AnswerError(Exception):
    """The server answered with an error.

    Attributes:
        status: of HTTP.
        message: what the server says, in one line.
        detail: what it adds, such as the place in a handler; empty if nothing.
    """

    def __init__(self, status: int, message: str, detail: Mapping[str, Any] | None = None):
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.detail = dict(detail or {})


class Client:
    """A server. Any thread; each has a connection of its own, which is kept.

    Args:
        url: where it answers predictions: ``http://host:8080``, ``https://host`` or ``unix:/path``.
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
        arrays = _arrays(inputs)
        if arrays is None:
            return self._predict_plainly(model, inputs, version)
        path = f"/v2/models/{_quoted(model)}" + (f"/versions/{_quoted(version)}" if version else "")
        named = arrays if isinstance(arrays, dict) else self._named(path, arrays)
        head, tail = _encoded(named, outputs)
        headers = {_JSON_SIZE_HEADER: str(len(head)), "Content-Type": "application/octet-stream"}
        body, answered = self._ask("POST", self.url, f"{path}/infer", head + tail, headers)
        is_torch = any(_is_torch(each) for each in named.values())
        found = _decoded(body, answered.get(_JSON_SIZE_HEADER.lower(), ""), is_torch)
        return next(iter(found.values())) if len(found) == 1 else found

    def _predict_plainly(self, model: str, inputs: Any, version: str | None) -> Any:
        headers = {}
        if isinstance(inputs, Path):
            body = inputs.read_bytes()
            kind = {".json": "application/json", ".txt": "text/plain"}.get(inputs.suffix.lower())
            headers = {"Content-Type": kind} if kind else {}
        elif isinstance(inputs, bytes | bytearray | memoryview):
            body = bytes(inputs)
        else:
            body, headers = json.dumps(inputs).encode(), {"Content-Type": "application/json"}
        path = f"/predictions/{_quoted(model)}" + (f"/{_quoted(version)}" if version else "")
        content, _ = self._ask("POST", self.url, path, body, headers)
        return _json_or_bytes(content)

    def _named(self, path: str, arrays: list[Any]) -> dict[str, Any]:
        """The inputs by the names that the model has for them."""
        names = self._names.get(path)
        if names is None or len(names) != len(arrays):
            told = json.loads(self._ask("GET", self.url, path)[0]).get("inputs", [])
            names = [str(each["name"]) for each in told] or [f"input{number}" for number in range(len(arrays))]
            self._names[path] = names
        if len(names) != len(arrays):
            raise ValueError(
                f"{path.rpartition('/')[2]} has the inputs {', '.join(names)}, and {len(arrays)} are given"
            )
        return dict(zip(names, arrays, strict=True))

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
        default = self._manage("GET", f"/models/{_quoted(model)}")[0]["modelVersion"]
        found: list[dict[str, Any]] = self._manage("GET", f"/models/{_quoted(model)}/all")
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
            raise _error(answer.status, answer.reason, content)
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
    return f"{parts.scheme}://{host}:{parts.port + 1}"


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _model_path(model: str, version: str | None) -> str:
    return f"/models/{_quoted(model)}" + (f"/{_quoted(version)}" if version else "")


def _error(status: int, reason: str, content: bytes) -> AnswerError:
    with contextlib.suppress(ValueError):
        told = json.loads(content)
        if isinstance(told, dict):
            message = told.get("message") or told.get("error") or reason
            detail = told.get("detail")
            detail = detail if isinstance(detail, dict) else {}
            more = "; ".join(str(detail[key]) for key in ("text", "where", "fix") if detail.get(key))
            return AnswerError(status, f"{message} ({more})" if more else str(message), detail)
    return AnswerError(status, reason)


def _json_or_bytes(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content


# --- arrays ---------------------------------------------------------------------------------------------------------


def _is_torch(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def _is_array(value: Any) -> bool:
    return _is_torch(value) or (hasattr(value, "__array_interface__") and hasattr(value, "dtype"))


def _arrays(inputs: Any) -> list[Any] | dict[str, Any] | None:
    """The arrays in ``inputs``; None if there are none."""
    if _is_array(inputs):
        return [inputs]
    if isinstance(inputs, Mapping) and inputs and all(map(_is_array, inputs.values())):
        return dict(inputs)
    if isinstance(inputs, list | tuple) and inputs and all(map(_is_array, inputs)):
        return list(inputs)
    return None


def _encoded(named: Mapping[str, Any], outputs: Sequence[str]) -> tuple[bytes, bytes]:
    """The JSON of a request, and the bytes of its tensors."""
    entries, parts = [], []
    for name, array in named.items():
        dtype, shape, raw = _raw(array)
        if dtype not in _DATATYPES:
            raise TypeError(f"input {name!r} has dtype {dtype}; give one of {', '.join(_DATATYPES)}")
        entries.append({"name": name, "shape": shape, "datatype": _DATATYPES[dtype],
                        "parameters": {"binary_data_size": len(raw)}})  # fmt: skip
        parts.append(raw)
    head: dict[str, Any] = {"inputs": entries, "parameters": {"binary_data_output": True}}
    if outputs:
        head["outputs"] = [{"name": name} for name in outputs]
    return json.dumps(head).encode(), b"".join(parts)


def _raw(array: Any) -> tuple[str, list[int], bytes]:
    if _is_torch(array):
        dtype, shape = str(array.dtype).removeprefix("torch."), list(array.shape)
        array = array.detach().cpu().contiguous()
        if dtype == "bfloat16":  # which numpy has not
            import torch

            array = array.view(torch.int16)
        return dtype, shape, array.numpy().tobytes()
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return str(array.dtype.name), list(array.shape), little.tobytes()


def _decoded(body: bytes, json_size: str, is_torch: bool) -> dict[str, Any]:
    size = int(json_size) if json_size else len(body)
    at = size
    found = {}
    for output in json.loads(body[:size])["outputs"]:
        count = output.get("parameters", {}).get("binary_data_size")
        if count is None:  # text: the protocol has no dtype of numpy for it
            found[output["name"]] = output["data"]
            continue
        raw, at = body[at : at + count], at + count
        found[output["name"]] = _array(output["datatype"], output["shape"], raw, is_torch)
    return found


def _array(datatype: str, shape: list[int], raw: bytes, is_torch: bool) -> Any:
    dtype = _DTYPES.get(datatype)
    if dtype is None:  # BYTES
        return raw
    if is_torch or dtype == "bfloat16":
        import torch

        kind = getattr(torch, dtype)
        return torch.frombuffer(bytearray(raw), dtype=kind).reshape(shape) if raw else torch.empty(shape, dtype=kind)
    import numpy as np

    little = np.frombuffer(bytearray(raw), dtype=np.dtype(dtype).newbyteorder("<"))
    return little.astype(dtype, copy=False).reshape(shape)
