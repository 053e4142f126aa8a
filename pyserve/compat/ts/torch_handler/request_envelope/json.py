"""``{"instances": [...]}`` in, ``{"predictions": [...]}`` out."""

from __future__ import annotations

import base64
import json
from typing import Any

from pyserve.handler import InputError
from ts.torch_handler.request_envelope.base import BaseEnvelope, body_of


class JSONEnvelope(BaseEnvelope):
    """Instances of all requests of a batch make one batch for the handler."""

    def parse_input(self, data: Any) -> list[Any]:
        """All instances; ``{"b64": text}`` becomes bytes.

        Raises:
            InputError: a request without instances.
        """
        self._lengths = []
        rows: list[Any] = []
        for row in data:
            value = body_of(row)
            if isinstance(value, (bytes, bytearray)):
                try:
                    value = json.loads(value)
                except ValueError as error:
                    raise InputError(f"the body is not JSON: {error}") from error
            if not isinstance(value, dict) or not isinstance(value.get("instances"), list):
                raise InputError('the request needs {"instances": [...]}')
            self._lengths.append(len(value["instances"]))
            rows += [_decoded(each) for each in value["instances"]]
        return rows

    def format_output(self, data: Any) -> list[Any]:
        """One text per request."""
        answers, start = [], 0
        for length in self._lengths:
            answers.append(json.dumps({"predictions": data[start : start + length]}))
            start += length
        return answers


def _decoded(instance: Any) -> Any:
    if isinstance(instance, dict) and set(instance) == {"b64"}:
        return base64.b64decode(instance["b64"])
    if isinstance(instance, dict):
        return {key: _decoded(value) for key, value in instance.items()}
    return instance
