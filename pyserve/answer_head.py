"""What a handler has set for an answer, as HTTP can send it: status, reason phrase and headers."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pyserve.context import Context, check_header
from pyserve.errors import HandlerError

# A line of the head ends at these; clients take others for its end.
_LINE_ENDS = re.compile(r"[\x00\n\x0b\x0c\r]")


class AnswerHead(NamedTuple):
    """What stands above an answer's body.

    Attributes:
        status: 200 to 599.
        reason: the phrase behind the status, ``""`` for none.
        headers: names in the handler's spelling, none twice in two spellings; latin-1.
    """

    status: int = 200
    reason: str = ""
    headers: Mapping[str, str] = {}


_PLAIN = AnswerHead()
# TorchServe has its own in all answers.
_CACHE_NAMES = ("cache-control", "expires", "pragma")


def answer_head(context: Context, index: int, *, is_strict: bool = False) -> AnswerHead:
    """What was set for answer ``index`` of the context's batch.

    Args:
        is_strict: what the handler says of caches is left out, as in TorchServe.

    Raises:
        HandlerError: it cannot be sent; the text says what.
    """
    processor = context.touched(index)
    if processor is None:
        return _PLAIN
    status, phrase = processor.get_response_status_code(), processor.get_response_status_phrase()
    headers = processor.get_response_headers()
    if status == 200 and not phrase and not headers:
        return _PLAIN
    sent = sent_headers(headers)
    if is_strict and sent:
        sent = {name: value for name, value in sent.items() if name.lower() not in _CACHE_NAMES}
    return AnswerHead(200 if status is None else _status(status), _reason(phrase), sent)


def sent_headers(headers: Mapping[str, Any]) -> dict[str, str]:
    """Of names that differ only in case the last; what latin-1 lacks becomes ``?``.

    As in TorchServe, ``Content-Type`` set as a header is stronger than `Context.set_response_content_type`.

    Raises:
        HandlerError: HTTP has no such header.
    """
    sent: dict[str, tuple[str, str]] = {}
    if "content-type" in headers and len(headers) > 1:
        headers = {"content-type": headers["content-type"], **headers}
    try:
        for name, value in headers.items():
            check_header(name, value)
            sent[name.lower()] = (
                name,
                value if value.isascii() else value.encode("latin-1", "replace").decode("latin-1"),
            )
    except (TypeError, ValueError) as error:
        raise HandlerError(
            "Prediction failed", detail={"text": str(error), "exception": type(error).__name__}
        ) from None
    return dict(sent.values())


def _status(status: Any) -> int:
    try:
        number = operator.index(status)  # numpy's integers too
    except TypeError:
        number = 0
    if not 200 <= number <= 599:
        raise HandlerError(f"the handler set the response status {status!r}; use an int from 200 to 599")
    return number


def _reason(phrase: Any) -> str:
    if not phrase:
        return ""
    if not isinstance(phrase, str):
        raise HandlerError(f"the handler set the reason phrase {phrase!r}; use a str")
    return _LINE_ENDS.sub(" ", phrase).encode("latin-1", "replace").decode("latin-1")
