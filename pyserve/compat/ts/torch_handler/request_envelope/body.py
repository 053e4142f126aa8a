"""Bodies without what is around them."""

from __future__ import annotations

from typing import Any

from ts.torch_handler.request_envelope.base import BaseEnvelope


class BodyEnvelope(BaseEnvelope):
    """Each row is the value of its field ``data`` or ``body``."""

    def parse_input(self, data: Any) -> list[Any]:
        """The values."""
        return [row.get("data") or row.get("body") for row in data]

    def format_output(self, data: Any) -> Any:
        """As they are."""
        return data
