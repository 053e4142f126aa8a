"""Request head: the bytes up to and with the blank line -> ``Head``.

Plain heads, which ordinary clients send, are read by csrc/http/head.h, where nothing of them is copied before somebody
asks. It leaves to the code below whatever it is not sure of, and all errors; a head that both can read is the same to
both (tests/http1/test_http1_heads.py).

httptools splits the head into headers and refuses what breaks the grammar of RFC 9112; it sees exactly one head and is
then thrown away, so nothing carries over from one request to the next (its trailers and its keep-alive flag would).
All that it lets through though a server must not is checked here: target, version, Host, framing headers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import quote_from_bytes, unquote_to_bytes

import httptools

from pyserve.errors import ClientError, MethodNotAllowedError, ServeError
from pyserve.http1.errors import (
    METHODS,
    HeadTooLargeError,
    InvalidHttpError,
    TargetTooLongError,
    UnknownCodingError,
    VersionError,
)
from pyserve.http1.limits import Http1Limits
from pyserve.request.ids import REQUEST_ID
from pyserve.request.messages import TIMING_HEADERS, HeaderList, Headers

try:
    from pyserve._http import read_plain
except ImportError:  # in a checkout whose extensions were built before there was this one
    read_plain = None  # type: ignore[assignment]
if TYPE_CHECKING:
    from pyserve import _http

_CACHE_COUNT_MAX = 1024
_CACHED_SIZE_MAX = 256
_CACHED_HEAD_SIZE_MAX = 1024

_METHODS = {name.encode(): name for name in METHODS}
# They ask for a tunnel, and for the request's own headers as an answer that scripts can read.
_REFUSED_METHODS = (b"CONNECT", b"TRACE")
_METHOD = re.compile(rb"[A-Za-z][A-Za-z0-9!#$%&'*+.^_`|~-]{0,31}\Z")
_VERSIONS = (b"HTTP/1.1", b"HTTP/1.0")
_VERSION = re.compile(rb"HTTP/[0-9]\.[0-9]\Z")
_TARGET = re.compile(rb"[!-~\x80-\xff]+\Z")
_ABSOLUTE = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?]*)([/?].*)?\Z")
_BAD_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ASCII = "".join(map(chr, range(0x21, 0x7F)))
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_HOST = re.compile(rb"(?:\[([0-9A-Fa-f:.]+)\]|[A-Za-z0-9._~!$&'()*+;=%-]+)(?::([0-9]*))?\Z")
_PORT_MAX = 65_535
_BARE_LF = re.compile(rb"(?<!\r)\n")
# White space after a value, which httptools does not let stand behind 'chunked' if it has a tab. Not that of a line
# with nothing else: without it the head would end there.
_SPACE_AFTER = re.compile(rb"(?<=[^\s])[ \t]+\r\n")
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")

# A dash and an underscore look the same once a proxy or a CGI-style environment has rewritten names, so a header
# spelled with underscores could pose as another one. These three are TorchServe's own and have no dashed twin.
_UNDERSCORE_NAMES = (b"ts_request_sequence_id", b"ts_request_sequence_start", b"ts_request_sequence_end")

_PLAIN, _DROPPED, _HOST_FIELD, _LENGTH, _TRANSFER, _CONNECTION, _EXPECT, _ID_FIELD, _TIMING, _ONE = range(10)
_KINDS = {
    b"host": _HOST_FIELD,
    b"content-length": _LENGTH,
    b"transfer-encoding": _TRANSFER,
    b"connection": _CONNECTION,
    b"expect": _EXPECT,
    b"x-request-id": _ID_FIELD,
    **{name.encode(): _TIMING for name in TIMING_HEADERS},
    # They say what the body is, and whose sequence it belongs to: two different ones would ask two different things.
    b"content-type": _ONE,
    b"inference-header-content-length": _ONE,
    **dict.fromkeys(_UNDERSCORE_NAMES, _ONE),
}

_names: dict[bytes, tuple[str, int]] = {}
_targets: dict[bytes, tuple[str, str, str]] = {}
_hosts: set[bytes] = set()


class RequestHead(HeaderList):
    """One checked request head. ``headers`` are without names with underscores, ``Transfer-Encoding`` and ``Expect``.

    Attributes:
        method: mostly one of ``METHODS``; any token but CONNECT and TRACE.
        path: percent-decoded once; ``"*"`` for ``OPTIONS *``.
        query: raw, without ``?``.
        is_http11: HTTP/1.1, else 1.0.
        keep_alive: whether the client wants the connection kept.
        length: announced body size in bytes; 0 if none.
        chunked: whether the body comes in chunks.
        expect: lower-case ``Expect`` value; ``""`` if none, or for HTTP/1.0, which has no such header.
        id: the client's ``x-request-id`` if it is a valid one, else ``""``.
        has_timing: whether one of TIMING_HEADERS is among the headers.
        is_simple: neither chunked, nor with ``Expect``.
    """

    __slots__ = (
        "chunked", "expect", "has_timing", "id", "is_http11", "is_simple", "keep_alive", "length", "method", "path",
        "query",
    )  # fmt: skip

    def __init__(self, method: str, path: str, query: str, headers: Headers, is_http11: bool):
        super().__init__(headers)
        self.method = method
        self.path = path
        self.query = query
        self.is_http11 = is_http11
        self.keep_alive = is_http11
        self.length = 0
        self.chunked = False
        self.expect = ""
        self.id = ""
        self.has_timing = False
        self.is_simple = True


Head: TypeAlias = "RequestHead | _http.Head"


class _Fields:
    """Receives the tokens of one head from httptools."""

    __slots__ = ("lines",)

    def __init__(self) -> None:
        self.lines: list[tuple[bytes, bytes]] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.lines.append((name, value))


def check_head_size(data: bytes | bytearray, start: int, end: int, limits: Http1Limits) -> None:
    """Raises if the head that begins at ``start`` is over a limit; ``end`` is -1 while it is incomplete.

    A head too long is refused with the same error whether it came at once or byte by byte.
    """
    line_end = data.find(b"\r\n", start, start + limits.line_size_max + 2)
    if line_end < 0 and len(data) - start >= limits.line_size_max + 2:
        check_head_start(data[start : start + limits.line_size_max + 2])
        raise TargetTooLongError(f"Request line is over the limit of {limits.line_size_max} bytes.")
    if end < 0 and len(data) - start >= limits.head_size_max:
        check_head_start(data[start : start + limits.head_size_max])
        raise HeadTooLargeError(f"Request head is over the limit of {limits.head_size_max} bytes.")


def check_head_start(data: bytes | bytearray, known: int = 0) -> None:
    """Refuses an unfinished head that can no longer become a request, such as a TLS handshake.

    It does so as soon as the bytes are there; so whatever else is wrong with a head that came at once, this comes
    first.

    Args:
        known: bytes at its beginning that were looked at before.
    """
    if known < 34:
        method, space, _ = bytes(data[:33]).partition(b" ")
        if not _METHOD.match(method) and data != b"\r":  # half an empty line
            raise InvalidHttpError("the request does not begin with a method")
        if not space and len(data) > 32:
            raise InvalidHttpError("the request does not begin with a method")
    if _BARE_LF.search(data, known):
        raise InvalidHttpError("a line ends with LF alone; it must end with CRLF")


class HeadReader:
    """Reads the heads of one listener. Loop thread only.

    Args:
        read_plain: reads plain heads; None has all of them read here.

    Attributes:
        takes_ids: a request keeps its client's ``x-request-id``.
    """

    def __init__(
        self, limits: Http1Limits, *, takes_ids: bool = True,
        read_plain: Callable[[bytes, int, bool], _http.Head | None] | None = read_plain,
    ):  # fmt: skip
        self._limits = limits
        self.takes_ids = takes_ids
        self._read_plain = read_plain
        self._known: dict[bytes, RequestHead] = {}  # others: a client on a kept connection may repeat its head

    def read(self, data: bytes) -> Head:
        """Reads one whole head, ``data`` ending with its blank line. Heads are shared: do not change one.

        Raises:
            InvalidHttpError, MethodNotAllowedError, UnknownCodingError, VersionError, HeadTooLargeError: the request
                cannot be read on safely; the connection must end.
        """
        if self._read_plain is not None:
            plain = self._read_plain(data, self._limits.header_count_max, self.takes_ids)
            if plain is not None:
                return plain
        head = self._known.get(data)
        if head is None:
            try:
                if data.count(b"\r\n") - 2 > self._limits.header_count_max:
                    raise HeadTooLargeError(f"Request has more than {self._limits.header_count_max} headers.")
                head = _read_head(data)
            except ServeError:
                check_head_start(data)
                raise
            if not self.takes_ids:
                head.id = ""
            if len(data) <= _CACHED_HEAD_SIZE_MAX:
                if len(self._known) >= _CACHE_COUNT_MAX:
                    self._known.clear()
                self._known[data] = head
        return head


def _read_head(data: bytes) -> RequestHead:
    line = data[: data.find(b"\r\n")].split(b" ")
    method = _METHODS.get(line[0])
    if method is None:
        if not _METHOD.match(line[0]):
            raise InvalidHttpError("the request does not begin with a method")
        method = line[0].decode()
    if len(line) != 3:
        raise InvalidHttpError("the request line is not 'METHOD target HTTP/1.1' with single spaces")
    token, target, version = line
    if version not in _VERSIONS:
        raise _refused_version(version)
    if token.upper() in _REFUSED_METHODS:
        raise MethodNotAllowedError(", ".join(METHODS))
    path, query, authority = _targets.get(target) or _read_target(target, method)
    if path == "*" and method != "OPTIONS":
        raise InvalidHttpError("only OPTIONS may have the target '*'")
    fields = _Fields()
    rest = data[data.find(b"\r\n") :]
    if b"\t" in rest:
        rest = _SPACE_AFTER.sub(b"\r\n", rest)
    try:
        # It is asked about the header lines only: it knows fewer methods and targets.
        httptools.HttpRequestParser(fields).feed_data(b"POST / %b%b" % (version, rest))
    except httptools.HttpParserUpgrade:
        pass  # no protocol to upgrade to: the request is served as HTTP/1.1 (RFC 9110, 7.8)
    except httptools.HttpParserError as error:
        raise InvalidHttpError(str(error)) from None
    head = _read_fields(fields.lines, RequestHead(method, path, query, [], version == b"HTTP/1.1"))
    if authority:  # it stands above the Host header (RFC 9112, 3.2.2)
        head.headers = [(name, authority if name.lower() == "host" else value) for name, value in head.headers]
    head.is_simple = not (head.chunked or head.expect)
    return head


def _read_fields(lines: list[tuple[bytes, bytes]], head: RequestHead) -> RequestHead:
    modern = head.keep_alive  # so far: HTTP/1.1
    headers = head.headers
    hosts: list[bytes] = []
    lengths: list[bytes] = []
    transfers: list[bytes] = []
    connections: list[bytes] = []
    ones: dict[bytes, bytes] = {}
    for name, raw in lines:
        text, kind = _names.get(name) or _read_name(name)
        if kind == _DROPPED:
            continue
        value = raw.rstrip(b" \t")
        headers.append((text, value.decode("latin-1")))
        if kind == _PLAIN:
            continue
        if kind == _HOST_FIELD:
            hosts.append(value)
        elif kind == _LENGTH:
            lengths.append(value)
        elif kind == _TRANSFER:
            transfers.append(value)
            headers.pop()  # of the body as a handler gets it nothing of this is true any more
        elif kind == _CONNECTION:
            connections.append(value)
        elif kind == _ONE:
            if ones.setdefault(name.lower(), value) != value:
                raise InvalidHttpError(f"two different {text[:_CACHED_SIZE_MAX]} headers")
        elif kind == _ID_FIELD:
            if REQUEST_ID.match(headers[-1][1]):
                head.id = headers[-1][1]
        elif kind == _TIMING:
            head.has_timing = True
        elif modern:
            head.expect = headers.pop()[1].lower()
    if len(hosts) != 1 or hosts[0] not in _hosts:
        _check_host(hosts)
    if lengths or transfers:
        _read_framing(lengths, transfers, modern, head)
    if connections or not modern:
        options = {option.strip().lower() for value in connections for option in value.split(b",")}
        head.keep_alive = b"close" not in options and (modern or b"keep-alive" in options)
    return head


def _read_framing(lengths: list[bytes], transfers: list[bytes], modern: bool, head: RequestHead) -> None:
    if lengths and transfers:
        raise InvalidHttpError("Content-Length and Transfer-Encoding in one request")
    if lengths:
        if len(lengths) > 1 or not lengths[0].isdigit() or len(lengths[0]) > 20:
            raise InvalidHttpError("Content-Length is not one decimal number")
        head.length = int(lengths[0])
        return
    if not modern:
        raise InvalidHttpError("Transfer-Encoding in an HTTP/1.0 request")
    codings = [coding.strip(b" \t").lower() for value in transfers for coding in value.split(b",")]
    if codings != [b"chunked"]:
        if all(_TOKEN.match(coding) for coding in codings) and any(coding != b"chunked" for coding in codings):
            raise UnknownCodingError("Transfer-Encoding other than 'chunked' is not implemented.")
        raise InvalidHttpError("Transfer-Encoding is not 'chunked'")
    head.chunked = True


def _check_host(hosts: list[bytes]) -> None:
    if not hosts or hosts == [b""]:
        return  # probes of load balancers send none
    if len(hosts) != 1:
        raise InvalidHttpError("more than one Host header")
    if not _is_host(hosts[0]):
        raise InvalidHttpError("Host is not 'name' or 'name:port'")
    if len(hosts[0]) <= _CACHED_SIZE_MAX:
        if len(_hosts) >= _CACHE_COUNT_MAX:
            _hosts.clear()
        _hosts.add(hosts[0])


def _is_host(text: bytes) -> bool:
    match = _HOST.match(text)
    if not match:
        return False
    address, port = match.groups(b"")
    try:
        if address:
            ipaddress.IPv6Address(address.decode())
    except ValueError:
        return False
    port = port.lstrip(b"0")
    return len(port) <= 5 and int(port or b"0") <= _PORT_MAX


def _read_name(name: bytes) -> tuple[str, int]:
    lower = name.lower()
    kind = _KINDS.get(lower, _PLAIN)
    if b"_" in name and lower not in _UNDERSCORE_NAMES:
        kind = _DROPPED
    named = (name.decode("latin-1"), kind)
    if len(name) <= _CACHED_SIZE_MAX:
        if len(_names) >= _CACHE_COUNT_MAX:
            _names.clear()
        _names[name] = named
    return named


def _read_target(target: bytes, method: str) -> tuple[str, str, str]:
    """Path, query and, of an http URL, its ``host:port``. A fragment is left out, as clients should have done.

    Bytes that are not ASCII are taken as if they were percent-encoded; those that are not UTF-8 then become U+FFFD.
    """
    if not _TARGET.match(target):
        raise InvalidHttpError("the target has a character that must be percent-encoded")
    local = target.partition(b"#")[0]
    authority = ""
    absolute = _ABSOLUTE.match(local)
    if absolute:
        if not _is_host(absolute[1]):
            raise InvalidHttpError("the target's host is not 'name' or 'name:port'")
        authority = absolute[1].decode()
        local = absolute[2] or b"/"
        if local[:1] == b"?":
            local = b"/" + local
        elif absolute[2] is None and method == "OPTIONS":
            local = b"*"  # RFC 9112, 3.2.4: the form a proxy gives 'OPTIONS *'
    if local[:1] != b"/" and local != b"*":
        raise InvalidHttpError("the target is not a path or an http URL")
    raw, _, query = local.partition(b"?")
    if _BAD_PERCENT.search(raw):
        raise InvalidHttpError("the target has '%' without two hexadecimal digits")
    decoded = unquote_to_bytes(raw)
    if _CONTROL.search(decoded):
        raise InvalidHttpError("the target has a percent-encoded control character")
    text = query.decode() if query.isascii() else quote_from_bytes(query, safe=_ASCII)
    parts = (decoded.decode("utf-8", "replace"), text, authority)
    if len(target) <= _CACHED_SIZE_MAX and not absolute:
        if len(_targets) >= _CACHE_COUNT_MAX:
            _targets.clear()
        _targets[target] = parts
    return parts


def asked_path(begin: bytes) -> str:
    """The path that a head asks for which was not read, as far as it can be told; ``""`` if it cannot."""
    method, _, rest = begin.partition(b"\r\n")[0].partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    return path.decode() if _METHOD.match(method) and _TARGET.match(path) and path.isascii() else ""


def _refused_version(version: bytes) -> ClientError:
    if _VERSION.match(version):
        return VersionError(f"{version.decode()} is not served; use HTTP/1.1.")
    return InvalidHttpError("the request line does not end with 'HTTP/1.1'")
