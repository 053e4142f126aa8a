"""KServe's protocol, version 1."""

from __future__ import annotations

import json
import logging
from typing import Any

from pyserve.handler import InputError
from ts.torch_handler.request_envelope.base import BaseEnvelope, body_of

logger = logging.getLogger(__name__)


class KServeEnvelope(BaseEnvelope):
    """``{"instances": [...]}`` in; ``{"predictions": [...]}`` or ``{"explanations": [...]}`` out, for each request."""

    def handle(self, data: Any, context: Any) -> Any:
        """Each request of a batch on its own: its instances are the handler's batch."""
        self.context = context
        if data is None or self._describes():
            return self._handle_fn(data, context)
        return [self.format_output(self._handle_fn(self.parse_input([row]), context))[0] for row in data]

    def parse_input(self, data: Any) -> list[Any]:
        """The instances of the first request, as they are.

        Raises:
            InputError: it has none.
        """
        value = body_of(data[0])
        if isinstance(value, (bytes, bytearray)):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise InputError(f"the body is not JSON: {error}") from error
        if not isinstance(value, dict) or not isinstance(value.get("instances"), list):
            raise InputError('the request needs {"instances": [...]}')
        instances: list[Any] = value["instances"]
        return instances

    def format_output(self, data: Any) -> list[Any]:
        """One object."""
        explains = self.context is not None and self.context.get_request_header(0, "explain") == "True"
        return [{"explanations" if explains else "predictions": data}]
