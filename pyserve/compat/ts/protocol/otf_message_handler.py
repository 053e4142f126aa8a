"""The frames between TorchServe's two processes. pyserve has a wire of its own; these are for tests and tools.

answer: >i status, text message, {text id, text media type, >i status, text phrase, headers, text body}..., >i -1
headers: >i count, {text name, text value}...        text: >i length, bytes
"""

from __future__ import annotations

import io
import json
import logging
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from pyserve.worker import streaming
from ts.utils.util import deprecated

END_OF_LIST = -1
LOAD_MSG = b"L"
PREDICT_MSG = b"I"
RESPONSE = 3
bool_size = 1
int_size = 4

log = logging.getLogger(__name__)


def retrieve_msg(conn: Any) -> tuple[bytearray, Any]:
    """Reads one message from a socket.

    Returns:
        (b"L", the model to load as a dict), or (b"I", a list of requests).

    Raises:
        ValueError: it is neither.
        EOFError: the other side has closed.
    """
    command = _read(conn, 1)
    if command == LOAD_MSG:
        return command, _read_load(conn)
    if command == PREDICT_MSG:
        return command, _read_requests(conn)
    raise ValueError(f"Invalid command: {command!r}")


def create_load_model_response(code: int, message: str) -> bytearray:
    """The answer to a model that was to be loaded."""
    return bytearray(_number(code) + _text(message) + _number(END_OF_LIST))


def create_predict_response(  # noqa: PLR0917 - TorchServe's signature
    ret: Sequence[Any] | None, req_id_map: Mapping[int, str], message: str, code: int, context: Any = None,
    ts_stream_next: bool = False,
) -> bytearray:  # fmt: skip
    """The answer to a batch.

    Args:
        ret: an answer per request; None if the batch failed.
        req_id_map: index in the batch -> request id.
        message: about the batch.
        code: status of the batch, and of each answer without ``context``.
        context: has each answer's status, phrase and headers.
        ts_stream_next: more parts of these answers follow.
    """
    out = bytearray(_number(code) + _text(message))
    try:
        bodies = [b"error" if ret is None else _encoded(ret[index]) for index in req_id_map]
    except (TypeError, ValueError, OverflowError):
        log.warning("Unable to serialize model output.", exc_info=True)
        return create_predict_response(None, req_id_map, "Unsupported model output data type.", 503)
    for (index, request_id), body in zip(req_id_map.items(), bodies, strict=True):
        out += _text(request_id)
        if context is None:
            out += _text("") + _number(code) + _text("") + _number(0)
        else:
            _mark_stream(context, index, ret, is_part=ts_stream_next)
            status, phrase = context.get_response_status(index)
            out += _text(context.get_response_content_type(index) or "") + _number(status) + _text(phrase or "")
            out += encode_response_headers(context.get_response_headers(index))
        out += _text(body)
    return out + _number(END_OF_LIST)


def encode_response_headers(resp_hdr_map: Mapping[str, str]) -> bytearray:
    """How many, and each with its value."""
    pairs = b"".join(_text(name) + _text(value) for name, value in resp_hdr_map.items())
    return bytearray(_number(len(resp_hdr_map)) + pairs)


@deprecated(version="1.0", replacement="ts.handler_utils.utils.send_intermediate_predict_response")
def send_intermediate_predict_response(ret: Any, req_id_map: Any, message: str, code: int, context: Any = None) -> None:
    """As `ts.handler_utils.utils.send_intermediate_predict_response`, which takes its place."""
    from ts.handler_utils import utils

    utils.send_intermediate_predict_response(ret, req_id_map, message, code, context)


def _mark_stream(context: Any, index: int, ret: Sequence[Any] | None, *, is_part: bool) -> None:
    """Says in a header whether more parts follow: it was asked for, or the handler's criterion decides."""
    header = streaming.STREAM_HEADER
    if is_part:
        context.set_response_header(index, header, "true")
    elif context.stopping_criteria and ret is not None:
        is_over = context.stopping_criteria[index](ret[index])
        if is_over is not None:
            context.set_response_header(index, header, "false" if is_over else "true")
    elif context.get_response_headers(index).get(header) == "true":
        context.set_response_header(index, header, "false")


def _encoded(value: Any) -> bytes:
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, str):
        return value.encode()
    if hasattr(value, "untyped_storage"):
        import torch

        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()
    return json.dumps(value, indent=2).encode()


def _number(value: int) -> bytes:
    return struct.pack(">i", value)


def _text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return _number(len(data)) + data


def _read(conn: Any, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        piece = conn.recv(size - len(data))
        if not piece:
            raise EOFError("the connection was closed within a message")
        data += piece
    return data


def _read_number(conn: Any) -> int:
    value: int = struct.unpack(">i", _read(conn, int_size))[0]
    return value


def _read_text(conn: Any) -> bytearray:
    return _read(conn, _read_number(conn))


def _read_load(conn: Any) -> dict[str, Any]:
    model: dict[str, Any] = {
        "modelName": _read_text(conn),
        "modelPath": _read_text(conn),
        "batchSize": _read_number(conn),
    }
    model["handler"] = _read_text(conn)
    gpu = _read_number(conn)
    if gpu >= 0:
        model["gpu"] = gpu
    model["envelope"] = _read_text(conn)
    model["limitMaxImagePixels"] = bool(_read(conn, bool_size)[0])
    return model


def _read_requests(conn: Any) -> list[dict[str, Any]]:
    requests = []
    while (length := _read_number(conn)) != END_OF_LIST:
        request: dict[str, Any] = {"requestId": _read(conn, length), "headers": [], "parameters": []}
        while (length := _read_number(conn)) != END_OF_LIST:
            request["headers"].append({"name": _read(conn, length), "value": _read_text(conn)})
        while (length := _read_number(conn)) != END_OF_LIST:
            name, kind = _read(conn, length).decode(), _read_text(conn).decode()
            request["parameters"].append({"name": name, "contentType": kind, "value": _typed(_read_text(conn), kind)})
        requests.append(request)
    return requests


def _typed(value: bytearray, kind: str) -> Any:
    """JSON read, text decoded; bytes as they came where that fails, and for all other kinds."""
    try:
        if kind == "application/json":
            return json.loads(value)
        if kind.startswith("text"):
            return value.decode()
    except ValueError:
        log.warning("a part that says %s is not", kind)
    return value
