"""The head of an ASGI request as bytes of HTTP/1.1: what is read, checked and limited of it is what a socket's is."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, MutableMapping
from typing import Any
from urllib.parse import quote, unquote

from pyserve.http1.errors import InvalidHttpError
from pyserve.http1.peer import client_name

Scope = MutableMapping[str, Any]

_FRAMING = (b"content-length", b"transfer-encoding")
_BREAKS = re.compile(rb"[\r\n\0]")
_SAFE = "/:@!$&'()*+,;=~-._"


def has_framing(scope: Scope) -> bool:
    """Whether the headers say how long the body is; of HTTP/2 they need not."""
    return any(bytes(name).lower() in _FRAMING for name, _ in scope["headers"])


def head_bytes(scope: Scope, *, is_chunked: bool) -> bytes:
    """The request line and the headers, with the blank line.

    Args:
        is_chunked: there is a body, and no header says so.

    Raises:
        InvalidHttpError: a part of it would end its line.
    """
    method = str(scope["method"]).encode("latin-1", "replace")
    version = b"HTTP/1.0" if scope.get("http_version") == "1.0" else b"HTTP/1.1"
    query = bytes(scope.get("query_string") or b"")
    target = asked_target(scope) + (b"?" + query if query else b"")
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    lines = [b"%b: %b" % (bytes(name), bytes(value)) for name, value in headers]
    if is_chunked:
        lines.append(b"transfer-encoding: chunked")
    first = b"%b %b %b" % (method, target, version)
    if any(_BREAKS.search(each) for each in (first, *lines)):
        raise InvalidHttpError("a line of the head holds a line break or NUL")
    return b"\r\n".join((first, *lines, b"", b""))


def asked_target(scope: Scope) -> bytes:
    """The path below the one that the application is mounted at, percent-encoded."""
    root = str(scope.get("root_path") or "").rstrip("/")
    path = str(scope["path"])
    raw = scope.get("raw_path")
    encoded = bytes(raw).partition(b"?")[0] if raw else quote(path, safe=_SAFE).encode()
    if not root or not (path == root or path.startswith(root + "/")):
        return encoded or b"/"  # the server has taken it away
    segments = encoded.split(b"/")
    depth = root.count("/") + 1
    if unquote(b"/".join(segments[:depth]).decode("latin-1")) == root:
        rest = b"/".join(segments[depth:])
    else:  # an encoded slash in it: where it ends cannot be told from the bytes
        rest = quote(path[len(root) + 1 :], safe=_SAFE).encode()
    return b"/" + rest


def client_of(scope: Scope) -> str:
    """As `client_name` of a socket. Proxies may have put anything there."""
    client = scope.get("client")
    if not client or not client[0]:
        return "unix"
    host, port = str(client[0]), client[1]
    if ":" in host:
        try:
            ipaddress.IPv6Address(host.partition("%")[0])
        except ValueError:
            return "unknown"
    return client_name((host, port))
