"""KServe's protocol, version 1, for built-in handlers: ``{"instances": [...]}`` in, ``{"predictions": [...]}`` out.

An instance is a row for the handler: a JSON value, text, or bytes as ``{"b64": "..."}``; one of the form
``{"data": value}`` is that value.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from pyserve.api.kserve_requests import AskedRowsPending
from pyserve.api.open_inference import quoted
from pyserve.body_kind import begins_as_object, text_of
from pyserve.errors import InputError
from pyserve.lanes.lane import Lane
from pyserve.models.model import EXPLAIN_HEADER
from pyserve.request.exchange import Exchange
from pyserve.request.json_body import load, parse_json
from pyserve.request.json_pieces import dump_in_slices
from pyserve.request.json_slices import SIZE_MIN
from pyserve.request.messages import Request, Response, dump_json, json_response

_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
# Members that clients send and that say nothing of the input.
_ABOUT_THE_REQUEST = ("id", "signature_name")


def is_instances_request(request: Request) -> bool:
    """Whether a body is meant to be of this protocol; else it is what TorchServe would bring to the handler."""
    body = request.body
    if not begins_as_object(body):
        return False
    return b'"instances"' in body or (b"\0" in body[:4] and '"instances"' in (text_of(body) or ""))


class InstancesPending(AskedRowsPending):
    """A request of instances."""

    __slots__ = ("_explains",)

    def __init__(self, lane: Lane, exchange: Exchange, version: str, *, explains: bool):
        headers = [("Accept", _JSON), EXPLAIN_HEADER if explains else ("explain", "False")]
        super().__init__(lane, exchange, version, "default", headers=headers)
        self._explains = explains

    def read(self) -> int:
        value = parse_json(self.exchange.request.body, in_slices=True)
        if not isinstance(value, dict) or not isinstance(value.get("instances"), list):
            raise InputError('the request needs {"instances": [...]}')
        unread = [name for name in value if name != "instances" and name not in _ABOUT_THE_REQUEST]
        if unread:
            raise InputError(f"the request has a member {quoted(unread[0])} that nothing reads, beside its instances")
        self.rows_to_ask = [_row_of(instance, position) for position, instance in enumerate(value["instances"])]
        return len(self.rows_to_ask)

    def make_answer(self) -> Response:
        values = [_value_of(bytes(answer.body)) for answer in self.answers]
        told = {"explanations" if self._explains else "predictions": values}
        if sum(len(answer.body) for answer in self.answers) < SIZE_MIN:
            return json_response(told)
        body = dump_in_slices(told, lambda value: dump_json(value)[:-1], indent=2) + b"\n"
        return Response(200, body, content_type=_JSON)


def _row_of(instance: Any, position: int) -> tuple[bytearray, str]:
    value = instance
    if isinstance(value, dict) and len(value) == 1:  # with others beside it, it is one of several inputs
        value = value.get("data", value.get("body", value))
    if isinstance(value, dict) and set(value) == {"b64"}:
        try:
            return bytearray(base64.b64decode(value["b64"], validate=True)), ""
        except (binascii.Error, TypeError, ValueError) as error:
            raise InputError(f"the 'b64' of instance {position} is not base64: {error}") from error
    if isinstance(value, str):
        return bytearray(value.encode("utf-8", "surrogatepass")), _TEXT
    return bytearray(dump_in_slices(value, _plain)), _JSON


def _plain(value: Any) -> bytes:
    return json.dumps(value).encode()


def _value_of(body: bytes) -> Any:
    try:
        return load(body)
    except ValueError:
        pass
    try:
        return body.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(body).decode()}
