"""One request as a worker process has it."""

from __future__ import annotations

from typing import Any, NamedTuple

Item = tuple[int, int, bytes, bytearray]  # ticket, flags, head, body
# Flag of an item, csrc/frame.h: it asks for the description of a model.
DESCRIBE = 1
HEADERS_KEPT_MAX = 256
HEADERS_KEPT_SIZE_MAX = 4096


class RequestHeaders(NamedTuple):
    """The headers of a request, and what decoding its body needs of them."""

    pairs: list[tuple[str, Any]]
    body_pairs: list[tuple[str, Any]]  # the same behind the entry of a field ``body``
    body_types: dict[str, str]  # the content type that entry has
    values: dict[str, str]  # by name in lower case; of a repeated one the last
    content_type: str  # media type in lower case without parameters, "" if there is none

    @classmethod
    def parse(cls, text: str) -> RequestHeaders:
        """From names and values in turn, joined by newlines."""
        texts = text.split("\n") if text else []
        pairs: list[tuple[str, Any]] = list(zip(texts[::2], texts[1::2], strict=True))
        values = {name.lower(): value for name, value in pairs}
        media_type = values.get("content-type", "").partition(";")[0]
        types = {"body": media_type}
        return cls(pairs, [*_entries(types), *pairs], types, values, media_type.strip().lower())


def _entries(types: dict[str, str]) -> list[tuple[str, Any]]:
    """TorchServe's handlers find the content type of each field under its name."""
    return [(name, {"content-type": text}) for name, text in types.items()]


# A client sends the same headers again and again.
_known_headers: dict[str, RequestHeaders] = {}


class WorkerRequest:
    """One request as it came over the wire, with what `codec.decode_request` asks for."""

    __slots__ = (
        "_headers", "_kept", "body", "content_type", "deadline", "flags", "headers", "id", "query", "row", "ticket",
    )  # fmt: skip

    def __init__(self, item: Item):
        self.ticket, self.flags, head, self.body = item
        self.id, text, self.query, *deadline = head.decode().split("\0")
        self.deadline = int(deadline[0]) if deadline else 0
        known = _known_headers.get(text)
        if known is None:
            known = RequestHeaders.parse(text)
            if len(text) <= HEADERS_KEPT_SIZE_MAX:
                if len(_known_headers) >= HEADERS_KEPT_MAX:
                    _known_headers.clear()
                _known_headers[text] = known
        self._headers = known
        self.headers = known.body_pairs
        self.content_type = known.content_type
        self.row: dict[str, Any] = {}
        self._kept: bytes | None = None

    def keep_body(self) -> None:
        """Before a call that may be tried again: a row may be the body itself, and handlers write to what they get."""
        is_row = any(value is self.body for value in self.row.values())
        self._kept = bytes(self.body) if is_row else None

    def put_body_back(self) -> None:
        """After a call that failed: makes the body what it was."""
        if self._kept is not None:
            self.body = bytearray(self._kept)

    def set_types(self, types: dict[str, str]) -> None:
        """Lets handlers find the content type of each field under its name. A header of that name goes before it."""
        known = self._headers
        self.headers = known.body_pairs if types == known.body_types else [*_entries(types), *known.pairs]

    def header(self, name: str, default: str = "") -> str:
        """Value of header ``name`` (any case); of a repeated one the last."""
        return self._headers.values.get(name.lower(), default)
