"""``Response`` -> bytes of an HTTP/1.1 answer.

What repeats is computed once: status lines, the header block every answer carries, the date of this second. Nothing a
handler sets reaches the wire unchecked: headers, reason and content type pass one validator, whose refusal replaces the
whole answer.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from http import HTTPStatus

from pyserve.errors import ServeError, ServerError
from pyserve.log import about
from pyserve.request.messages import ErrorFormat, Request, Response, SharedHeaders

JOINED_SIZE_MAX = 64 * 1024  # a larger body is written beside its head, not copied behind it

log = logging.getLogger("pyserve.http1")

_BODYLESS_STATUSES = (204, 304)
_PHRASES = {int(status): status.phrase for status in HTTPStatus if status >= 200}
_STATUS_LINES = {status: f"HTTP/1.1 {status} {phrase}\r\n" for status, phrase in _PHRASES.items()}
_EMPTY_STATUS_LINES = {status: f"HTTP/1.1 {status} \r\n" for status in range(200, 600)}
_COMMON = {
    "pragma": "Pragma: no-cache\r\n",
    "cache-control": "Cache-Control: no-cache; no-store, must-revalidate, private\r\n",
    "expires": "Expires: Thu, 01 Jan 1970 00:00:00 UTC\r\n",
}
_COMMON_LINES = "".join(_COMMON.values())
# As TorchServe's server: more than RFC 9110 allows, nothing that ends a line or a name.
_NAME = re.compile(r"[!-+\-./0-9<>-~]+\Z")
_VALUE = re.compile(r"[^\x00\n\x0b\x0c\r\u0100-\U0010ffff]*\Z")
# Framing and the life of the connection are the protocol's; so is the id the client was promised.
_OWN_NAMES = frozenset(
    ("connection", "content-length", "date", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding",
     "upgrade", "x-request-id")
)  # fmt: skip
# Status, reason, content type, whether the connection is kept, further headers.
_Kind = tuple[int, str | None, str | None, bool, SharedHeaders | None]
# Kinds of answers in one second, more or less; content types may be of a handler's making.
_PLAIN_MAX = 64

_ANY_REQUEST = Request("POST", "/")

INTERNAL_ERROR = "Internal server error; the server's log has the reason."


def told_error(error: Exception, request: Request, logger: logging.Logger) -> ServeError:
    """What is answered where an app raised ``error``: of one that is none of ours, that the log has it."""
    if isinstance(error, ServeError):
        return error
    logger.error("request %s %s %s failed", request.id, request.method, request.path, exc_info=error,
                 extra=about(request_id=request.id))  # fmt: skip
    return ServerError(INTERNAL_ERROR)


class InvalidAnswerError(ServerError):
    """A handler's status, reason, content type or header cannot be written as HTTP. Never sent as such."""


class AnswerWriter:
    """Builds answer heads. One per listener; loop thread only.

    Args:
        decorate: adds headers to every answer, such as those that browsers want to see.
        error_format: how the error becomes an answer that takes the place of one that cannot be sent.
    """

    def __init__(
        self,
        wall_clock: Callable[[], float] = time.time,
        decorate: Callable[[Request, Response], None] | None = None,
        error_format: ErrorFormat | None = None,
    ):
        self._wall_clock = wall_clock
        self._error_format = error_format or ErrorFormat()
        self._decorate = decorate
        self._second = -1
        self._common = ""
        self._plain: dict[_Kind, tuple[bytes, bytes, bytes]] = {}

    def encode(
        self, response: Response, request: Request, keep_alive: bool
    ) -> tuple[bytes, Sequence[bytes | memoryview]]:
        """The answer's bytes: all of them, or the head and beside it the parts of a body too big to copy.

        An answer that cannot be written as HTTP is logged and replaced by a 500.
        """
        body = response.body
        tail = response.tail
        if response.status == 205:  # it has a size, which is 0
            body, tail = b"", ()
        decorate = self._decorate
        is_plain = type(body) is bytes and not tail and decorate is None
        if is_plain and request.method != "HEAD" and len(body) <= JOINED_SIZE_MAX:
            # All but the id and the size is the same for a whole second.
            parts = None
            if int(self._wall_clock()) == self._second:
                headers = response.headers
                shared = headers if type(headers) is SharedHeaders else None
                if shared is not None or not headers:
                    key = (response.status, response.reason, response.content_type, keep_alive, shared)
                    parts = self._plain.get(key)
            if parts is not None:
                before, between, after = parts
                return b"".join((before, request.id.encode("latin-1"), between, b"%d" % len(body), after, body)), ()
        bodyless = response.status in _BODYLESS_STATUSES
        try:
            if type(body) is not bytes:
                view = memoryview(body)
                body = view.cast("B") if view.nbytes else b""
            size = len(body) + sum(map(len, tail))
            if decorate is not None:
                decorate(request, response)
            head = self.head(response, request.id, keep_alive, None if bodyless else size)
        except Exception:
            log.exception("answer to request %s %s %s cannot be sent", request.id, request.method, request.path,
                          extra=about(request_id=request.id))  # fmt: skip
            response = self._error_format.answer(ServerError(INTERNAL_ERROR), request)
            body, tail, size, bodyless = response.body, (), len(response.body), False
            head = self.head(response, request.id, keep_alive, size)
        if bodyless or request.method == "HEAD":
            return head, ()
        if size <= JOINED_SIZE_MAX:
            return b"".join((head, body, *tail)), ()
        return head, (memoryview(body), *tail)

    def stream_head(self, response: Response, request: Request, keep_alive: bool, is_chunked: bool) -> bytes | None:
        """The head of an answer whose parts follow. None, and a line in the log, if it cannot be written as HTTP."""
        try:
            framing = "transfer-encoding: chunked\r\n" if is_chunked else ""
            if self._decorate is not None:
                self._decorate(request, response)
            return self.head(response, request.id, keep_alive, None, framing)
        except Exception:
            log.exception("answer to request %s %s %s cannot be sent", request.id, request.method, request.path,
                          extra=about(request_id=request.id))  # fmt: skip
            return None

    def head(self, response: Response, request_id: str, keep_alive: bool, size: int | None, framing: str = "") -> bytes:
        """Status line and headers with the blank line.

        Args:
            size: of the body; None for statuses without one (204, 304), and when ``framing`` says how it ends.

        Raises:
            InvalidAnswerError: the response cannot be written as HTTP.
        """
        before, between, after = self._pieces(response, keep_alive)
        length = framing if size is None else f"content-length: {size}\r\n"
        headers = response.headers
        shared = headers if type(headers) is SharedHeaders else None
        if size is not None and (shared is not None or not headers) and len(self._plain) < _PLAIN_MAX:
            self._plain[response.status, response.reason, response.content_type, keep_alive, shared] = (
                before.encode("latin-1"), f"{between}content-length: ".encode("latin-1"),
                f"\r\n{after}".encode("latin-1"),
            )  # fmt: skip
        return f"{before}{request_id}{between}{length}{after}".encode("latin-1")

    def lasting(self, response: Response) -> tuple[int, bytes, bytes, bytes]:
        """The second for which it holds, and the head of answers like ``response`` on a connection that is kept: what
        stands before the id, between that and the size, and behind the size.

        REQUIRES: what `decorate` adds is the same for all requests.

        Raises:
            InvalidAnswerError: the response cannot be written as HTTP.
        """
        if self._decorate is not None:
            self._decorate(_ANY_REQUEST, response)
        before, between, after = self._pieces(response, keep_alive=True)
        between, after = f"{between}content-length: ", f"\r\n{after}"
        return self._second, before.encode("latin-1"), between.encode("latin-1"), after.encode("latin-1")

    def _pieces(self, response: Response, keep_alive: bool) -> tuple[str, str, str]:
        """What stands in a head before the id, between that and the line about the size, and behind that line."""
        status = response.status
        reason = response.reason
        line = _STATUS_LINES.get(status) if reason is None else _EMPTY_STATUS_LINES.get(status) if not reason else None
        if line is None:
            line = _status_line(status, reason)
        second = int(self._wall_clock())
        if second != self._second:
            self._second = second
            self._plain.clear()
            self._common = f"{_COMMON_LINES}Date: {formatdate(second, usegmt=True)}\r\n"
        common = self._common
        extra = ""
        content_type = response.content_type
        if content_type is not None:
            if content_type != "application/json" and not _VALUE.match(content_type):
                raise InvalidAnswerError("The content type has a character that HTTP does not allow.")
            extra = f"content-type: {content_type}\r\n"
        if response.headers:
            dropped, lines = _extra_lines(response.headers, content_type is not None)
            extra += lines
            if dropped:
                common = "".join(line for name, line in _COMMON.items() if name not in dropped)
                common += f"Date: {formatdate(second, usegmt=True)}\r\n"
        connection = "keep-alive" if keep_alive else "close"
        return f"{line}x-request-id: ", f"\r\n{common}{extra}", f"connection: {connection}\r\n\r\n"


def _status_line(status: int, reason: str | None) -> str:
    if not isinstance(status, int) or not 200 <= status <= 599:
        raise InvalidAnswerError(f"Status {status!r} is not a final HTTP status from 200 to 599.")
    if reason is None:
        reason = _PHRASES.get(status, "")
    if not isinstance(reason, str) or not _VALUE.match(reason):
        raise InvalidAnswerError("The reason phrase has a character that HTTP does not allow.")
    return f"HTTP/1.1 {int(status)} {reason}\r\n"


def _extra_lines(headers: dict[str, str], has_type: bool) -> tuple[set[str], str]:
    """Header lines of a handler, and those of the common lines they take the place of."""
    lines = []
    replaced = set()
    for name, value in headers.items():
        if not isinstance(name, str) or not _NAME.match(name):
            raise InvalidAnswerError("A response header's name is not a token.")
        if not isinstance(value, str) or not _VALUE.match(value):
            raise InvalidAnswerError(f"Response header {name} has a character that HTTP does not allow.")
        lower = name.lower()
        if lower in _OWN_NAMES or (has_type and lower == "content-type"):
            continue
        if lower in _COMMON:
            replaced.add(lower)
        lines.append(f"{name}: {value}\r\n")
    return replaced, "".join(lines)
