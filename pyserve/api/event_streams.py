"""Server-sent events: each part that a handler yields is an event, for clients that ask with ``Accept``.

    id: 8b2f…/1
    data: the first part

    event: end
    data: {"parts": 1}

The last one is ``event: end``, or ``event: error`` with the error's JSON if the handler fails midway. A handler that
answers ``text/event-stream`` by itself is left alone.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Callable

from pyserve.models.model import Model
from pyserve.request.accept import accepted
from pyserve.request.exchange import Exchange, Part
from pyserve.request.messages import Request, Response
from pyserve.request.relay import Relay

EVENT_STREAM = "text/event-stream"
# While a handler is silent; proxies close connections on which nothing comes for a minute.
KEEP_ALIVE_S = 15.0
_KEEP_ALIVE = b": keep-alive\n\n"
_LINE_END = re.compile(r"\r\n|\r|\n")
# Ids as they are made here: a client that sends one has lost a stream that cannot be continued.
_OWN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}/[0-9]{1,9}\Z")
_OF_THE_BODY = ("content-type", "content-length")


def event(data: str, *, kind: str = "", id: str = "") -> bytes:
    """One event. Ends of lines within ``data`` become line feeds, as the format has no other."""
    lines = [f"id: {id}"] if id else []
    if kind:
        lines.append(f"event: {kind}")
    lines += [f"data: {line}" for line in _LINE_END.split(data)]
    return ("\n".join(lines) + "\n\n").encode("utf-8", "backslashreplace")


def predict(model: Model, exchange: Exchange, url_version: str = "default", *, explains: bool = False,
            query_is_input: bool = False) -> None:  # fmt: skip
    """As `Model.predict`, with the answer as events if the client wants them."""
    if "event-stream" in exchange.request.header("accept").lower():
        if _OWN_ID.match(exchange.request.header("last-event-id")) and _wants_events(exchange.request):
            exchange.respond(Response(204))  # to a browser that means: do not connect again
            return
        exchange = with_events(exchange)
    model.predict(exchange, url_version, explains=explains, query_is_input=query_is_input)


def with_events(exchange: Exchange) -> Exchange:
    """What to answer in place of ``exchange``, which then sends events if its client wants them."""
    return EventStream(exchange).exchange if _wants_events(exchange.request) else exchange


def _wants_events(request: Request) -> bool:
    """Whether no other media type that is named is wanted more."""
    weights = accepted(request, "accept")
    mine = weights.get(EVENT_STREAM, 0.0)
    others = [weight for name, weight in weights.items() if name != EVENT_STREAM and not name.endswith("/*")]
    return mine > 0 and mine >= max(others, default=0.0)


def _takes_nothing_else(request: Request) -> bool:
    return not any(weight for name, weight in accepted(request, "accept").items() if name != EVENT_STREAM)


class EventStream(Relay):
    """An answer as events.

    Args:
        call_later: of the loop, for tests.
    """

    def __init__(self, outer: Exchange, call_later: Callable[..., asyncio.TimerHandle] | None = None):
        super().__init__(outer)
        self._call_later = call_later or asyncio.get_running_loop().call_later
        self._count = 0
        self._is_quiet = False  # since the timer was set
        self._passes = False  # the handler makes the events itself
        self._timer: asyncio.TimerHandle | None = None

    def whole(self, response: Response) -> None:
        """One event, if it is no error and the client takes nothing else."""
        is_error = response.status >= 300 or response.error is not None
        if is_error or _is_event_stream(response) or not _takes_nothing_else(self.outer.request):
            self.outer.respond(response)
            return
        body = b"".join((response.body, *response.tail))
        head = _head(response)
        head.body = (self._event(body) if body else b"") + self._end()
        self.outer.respond(head)

    def begin(self, head: Response) -> None:
        self._passes = _is_event_stream(head)
        if self._passes:
            head.body = b""  # it is the first part
            self.outer.start_stream(head)
            return
        self.outer.start_stream(_head(head))
        self._set_timer()

    def part(self, part: Part) -> None:
        self._is_quiet = False
        self.outer.write(part if self._passes else self._event(bytes(part)))

    def end(self) -> None:
        self._stop_timer()
        self.outer.end_stream(b"" if self._passes else self._end())

    def fail(self, failure: Response | None) -> None:
        self._stop_timer()
        if self._passes:
            self.outer.abort_stream(failure)
        else:
            self.outer.end_stream(event(one_line(failure), kind="error"))

    def leave(self) -> None:
        self._stop_timer()
        super().leave()

    def _event(self, part: bytes) -> bytes:
        self._count += 1
        id = f"{self.outer.request.id}/{self._count}"
        try:
            return event(part.decode(), id=id)
        except UnicodeDecodeError:  # the format is text
            return event(base64.b64encode(part).decode(), id=id, kind="base64")

    def _end(self) -> bytes:
        return event(json.dumps({"parts": self._count}), kind="end")

    def _set_timer(self) -> None:
        self._is_quiet = True
        self._timer = self._call_later(KEEP_ALIVE_S, self._on_timer)

    def _on_timer(self) -> None:
        if self._is_quiet and not self.outer.parts:  # else the client does not read what there is
            self.outer.write(_KEEP_ALIVE)
        if not self.outer.disconnected:
            self._set_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def one_line(failure: Response | None) -> str:
    """The JSON of an error answer, in one line."""
    if failure is None:
        return json.dumps({"code": 500, "type": "InternalServerException", "message": "Internal error"})
    try:
        return json.dumps(json.loads(bytes(failure.body)), ensure_ascii=False)
    except ValueError:
        return bytes(failure.body).decode("utf-8", "replace")


def _is_event_stream(response: Response) -> bool:
    told = response.content_type or next(
        (str(value) for name, value in response.headers.items() if str(name).lower() == "content-type"), ""
    )
    return told.partition(";")[0].strip().lower() == EVENT_STREAM


def _head(response: Response) -> Response:
    """Of the events: the handler's status and headers."""
    headers = {name: value for name, value in response.headers.items() if str(name).lower() not in _OF_THE_BODY}
    # Or nginx would collect events before it passes them on.
    headers.setdefault("X-Accel-Buffering", "no")
    return Response(response.status, b"", content_type=EVENT_STREAM, reason=response.reason, headers=headers)
