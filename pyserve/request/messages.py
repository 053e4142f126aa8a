"""The HTTP messages that pass between the protocol and the endpoints. No I/O, no policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote_plus

from pyserve.errors import JsonObject, ServeError
from pyserve.request import quick_json

Headers = list[tuple[str, str]]

TIMEOUT_HEADER = "x-request-timeout-ms"
# What a client may ask about time, in lower case. Most requests have none of them, and then nobody looks for one.
ASK_HEADER = "x-server-timing"
TIMING_HEADERS = frozenset({TIMEOUT_HEADER, ASK_HEADER})


def join_headers(headers: Headers) -> str:
    """Names and values in turn, joined by newlines."""
    return "\n".join([text for pair in headers for text in pair])


def lower_names(headers: Headers) -> dict[str, str]:
    """Value by name in lower case; the last one of a repeated header."""
    return {name.lower(): value for name, value in headers}


class HeaderFields(Protocol):
    """The headers of one request, read when somebody asks. Not to be changed."""

    @property
    def headers(self) -> Headers:
        """Name/value pairs in order, names in the client's own spelling, decoded as latin-1."""

    @property
    def text(self) -> str:
        """``headers`` joined, see `join_headers`."""

    @property
    def bytes(self) -> bytes | None:
        """The whole head that they are of, as it came, if that was kept."""

    def find(self, name: str, /) -> str | None:
        """Value of the last header called ``name``, which is in lower case; None if there is none."""


class HeaderList:
    """Headers that are there as pairs already."""

    __slots__ = ("_lower", "_text", "headers")
    bytes: bytes | None = None

    def __init__(self, headers: Headers):
        self.headers = headers
        self._text: str | None = None
        self._lower: dict[str, str] | None = None

    @property
    def text(self) -> str:
        if self._text is None:
            self._text = join_headers(self.headers)
        return self._text

    def find(self, name: str, /) -> str | None:
        if self._lower is None:
            self._lower = lower_names(self.headers)
        return self._lower.get(name)


class ExtraHeaders:
    """Headers that the server adds to a request, made once for many."""

    __slots__ = ("lower", "pairs", "text")

    def __init__(self, *pairs: tuple[str, str]):
        self.pairs = list(pairs)
        self.text = join_headers(self.pairs)
        self.lower = lower_names(self.pairs)


class Request:
    """One complete HTTP request.

    Attributes:
        method: upper-case token, e.g. ``"POST"``.
        path: percent-decoded path, e.g. ``"/predictions/digits"``.
        query: raw query string without ``?``; ``""`` if none.
        body: the whole body, dechunked. A ``bytearray`` owned by this request.
        client: ``"127.0.0.1:43090"``, or ``"unix"``.
        id: the client's ``x-request-id`` if it is a valid one, else a fresh UUID4.
        arrived_at: when the last byte was read, in ns of ``time.monotonic_ns()``.
        has_timing: whether one of TIMING_HEADERS is among the headers, or there is a ``deadline``.
        deadline: ns of the same clock; when the client stops waiting, if the protocol tells; else 0.
        is_http: it came over HTTP.
        stages: where its time goes, see `pyserve.request.stages`; there only where that is kept of all requests.
    """

    is_http = True

    __slots__ = (
        "_extra", "_fields", "_params", "arrived_at", "body", "client", "deadline", "has_timing", "id", "method",
        "path", "query", "stages",
    )  # fmt: skip
    stages: Any

    def __init__(
        self,
        method: str,
        path: str,
        *,
        query: str = "",
        headers: Headers | None = None,
        body: bytearray | None = None,
        client: str = "",
        id: str = "",
        arrived_at: int = 0,
        has_timing: bool | None = None,
        fields: HeaderFields | None = None,
    ):
        """``fields`` are in place of ``headers``."""
        self.method = method
        self.path = path
        self.query = query
        self._fields: HeaderFields = fields if fields is not None else HeaderList(headers or [])
        self._extra: ExtraHeaders | None = None
        self.body = body if body is not None else bytearray()
        self.client = client
        self.id = id
        self.arrived_at = arrived_at
        if has_timing is None:
            has_timing = any(name.lower() in TIMING_HEADERS for name, _ in self._fields.headers)
        self.has_timing = has_timing
        self.deadline = 0
        self._params: list[tuple[str, str]] | None = None

    @property
    def segments(self) -> tuple[str, ...]:
        """``path`` split on ``/``, trailing empty segments dropped; ``("predictions", "digits")``."""
        return tuple(self.path.rstrip("/").split("/")[1:])

    def add_headers(self, extra: ExtraHeaders) -> None:
        """Adds what the handler has to know. Nothing is joined before it is read."""
        if extra.pairs:
            self._extra = extra if self._extra is None else ExtraHeaders(*self._extra.pairs, *extra.pairs)

    @property
    def headers(self) -> Headers:
        """Name/value pairs in order, names in the client's own spelling, decoded as latin-1. Not to be changed."""
        headers = self._fields.headers
        return headers if self._extra is None else headers + self._extra.pairs

    @property
    def header_text(self) -> str:
        """The same, as names and values in turn, joined by newlines."""
        text = self._fields.text
        if self._extra is None:
            return text
        return f"{text}\n{self._extra.text}" if text else self._extra.text

    @property
    def head_bytes(self) -> bytes | None:
        """The whole head as it came, if that was kept and nothing was added to it."""
        return None if self._extra is not None else self._fields.bytes

    def replace_headers(self, names: Sequence[str], pairs: Headers) -> None:
        """Puts ``pairs`` in the place of the headers called ``names``, which are in lower case."""
        self._fields = HeaderList([pair for pair in self.headers if pair[0].lower() not in names] + pairs)
        self._extra = None

    def header(self, name: str, default: str = "") -> str:
        """Value of header ``name`` (any case). A repeated header gives its last value."""
        name = name.lower()
        if self._extra is not None and name in self._extra.lower:
            return self._extra.lower[name]
        value = self._fields.find(name)
        return default if value is None else value

    @property
    def content_type(self) -> str:
        """Media type in lower case without parameters, ``""`` if there is none."""
        return self.header("content-type").partition(";")[0].strip().lower()

    @property
    def params(self) -> list[tuple[str, str]]:
        """Query parameters in order; ``&`` and ``;`` both separate, blanks are kept."""
        if self._params is None:
            pairs = [part.partition("=") for part in self.query.replace(";", "&").split("&") if part]
            self._params = [(unquote_plus(key), unquote_plus(value)) for key, _, value in pairs]
        return self._params


class SharedHeaders(dict[str, str]):
    """Headers that many answers have in common and nobody changes, so that their bytes are made once."""

    __slots__ = ()

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class Response:
    """One HTTP answer.

    Attributes:
        status: HTTP status code.
        body: bytes-like.
        content_type: value of ``content-type``; ``None`` sends none (as TorchServe does for predictions).
        reason: ``None`` means the standard phrase; ``""`` an empty one (as TorchServe does for predictions).
        headers: further headers. Framing headers (content-length, connection, ...) belong to the protocol.
        tail: what follows ``body``; large parts that nobody need put together. Of HTTP's answers only.
        error: what this is the answer to, for protocols with error answers of their own; None for any other answer.
    """

    __slots__ = ("body", "content_type", "error", "headers", "reason", "status", "tail")

    def __init__(
        self,
        status: int = 200,
        body: bytes | bytearray | memoryview = b"",
        *,
        content_type: str | None = None,
        reason: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        self.status = status
        self.body = body
        self.content_type = content_type
        self.reason = reason
        self.headers = headers or {}
        self.tail: Sequence[bytes | memoryview] = ()
        self.error: ServeError | None = None


def dump_json(value: Any) -> bytes:
    """Server JSON as TorchServe prints it: two-space indent, no HTML escaping, a newline at the end."""
    text = quick_json.write(value)
    if text is not None:
        return text + b"\n"
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A ``Response`` with ``value`` as pretty-printed JSON."""
    return Response(status, dump_json(value), content_type="application/json", headers=headers)


# Members of ``detail`` that quote exceptions or name files: for eyes on this machine only. So is a ``fix`` that stands
# beside an exception, since it may name what the archive's code imports or opens.
PRIVATE_DETAIL = frozenset({"text", "exception", "where"})


@dataclass(frozen=True)
class ErrorFormat:
    """How errors become answers.

    Attributes:
        with_detail: whether bodies carry ``detail``, which TorchServe's do not have.
        with_private_detail: whether that may hold PRIVATE_DETAIL.
        kserve_versions: of those versions of KServe's protocol the errors have its member ``error``.
    """

    with_detail: bool = True
    with_private_detail: bool = True
    kserve_versions: tuple[str, ...] = ("v1", "v2")

    def answer(self, error: ServeError, request: Request) -> Response:
        """`response` to ``request``, with the member ``error`` where KServe's protocol is spoken."""
        return self.response(error, request.id, is_kserve=request.path[1:].partition("/")[0] in self.kserve_versions)

    def response(self, error: ServeError, request_id: str, *, is_kserve: bool = False) -> Response:
        """The answer to a failed request. ``detail`` has its id too, so that the log can be searched for it."""
        body = error.body()
        if is_kserve:
            body["error"] = error.message
        body.pop("detail", None)
        if self.with_detail:
            body["detail"] = self.detail(error, request_id)
        response = json_response(body, error.status, error.headers)
        response.error = error
        return response

    def detail(self, error: ServeError, request_id: str) -> JsonObject:
        """What may be shown of ``error`` beside its message; ``{}`` without ``with_detail``."""
        if not self.with_detail:
            return {}
        hidden: frozenset[str] = frozenset()
        if not self.with_private_detail:
            hidden = PRIVATE_DETAIL | {"fix"} if "exception" in error.detail else PRIVATE_DETAIL
        return {**{key: value for key, value in error.detail.items() if key not in hidden}, "request_id": request_id}
