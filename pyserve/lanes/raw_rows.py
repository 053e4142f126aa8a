"""Requests whose body is an item's numbers as they lie in memory, answered with the bytes of the output's row.

Nothing of such a body is looked at in Python: the engine takes it where it lies and hands over rows. Which requests are
of that kind, and what stands in the answer's head, is up to the handler and decided once for requests that look alike.
"""

from __future__ import annotations

from typing import Protocol

import torch

from pyserve.request.messages import Request, SharedHeaders
from pyserve.tensor_types import may_be_read

RAW_TYPE = "application/octet-stream"
_KNOWN_MAX = 1024
_KNOWN_SIZE_MAX = 1024


class RawHandler(Protocol):
    """What a handler has to provide; `handlers.tensor.TensorHandler` does."""

    @property
    def raw_item_size(self) -> int: ...

    def takes_raw(self, content_type: str, accept: str) -> bool: ...

    def raw_headers(self, output: torch.Tensor) -> list[tuple[str, str]]: ...


class RawRows:
    """The raw requests of one model. Loop thread only.

    Attributes:
        item_size: bytes of one item.
    """

    def __init__(self, handler: RawHandler):
        self.item_size = handler.raw_item_size
        self._handler = handler
        self._known: dict[tuple[str, str], bool] = {}  # by content type and accepted types
        self._headers: dict[tuple[torch.dtype, torch.Size], SharedHeaders] = {}

    @classmethod
    def of(cls, handler: object, example: list[torch.Tensor]) -> RawRows | None:
        """None if the handler has to see every body."""
        size = getattr(handler, "raw_item_size", 0)
        is_one = len(example) == 1 and example[0].nbytes == size
        return cls(handler) if size and is_one else None  # type: ignore[arg-type]

    def takes(self, request: Request) -> bool:
        """Whether ``request`` is one of them."""
        if len(request.body) != self.item_size:
            return False
        types = request.header("content-type"), request.header("accept")
        known = self._known.get(types)
        if known is None:
            known = self._handler.takes_raw(*types)
            if len(types[0]) + len(types[1]) <= _KNOWN_SIZE_MAX:
                if len(self._known) >= _KNOWN_MAX:
                    self._known.clear()
                self._known[types] = known
        return known and not may_be_read(types[0], request.body)

    def headers(self, output: torch.Tensor) -> SharedHeaders:
        """Of an answer with a row of ``output`` [n, ...]; without its content type, which is RAW_TYPE."""
        key = output.dtype, output.shape[1:]
        headers = self._headers.get(key)
        if headers is None:
            if len(self._headers) >= _KNOWN_MAX:
                self._headers.clear()
            pairs = self._handler.raw_headers(output)
            headers = self._headers[key] = SharedHeaders(pair for pair in pairs if pair[0] != "content-type")
        return headers
