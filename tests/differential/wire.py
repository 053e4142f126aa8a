"""Sends one call as it is written, byte by byte, and reads the answer."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
from typing import Any

from tests.differential.case import Call
from tests.differential.servers import Running

Answer = dict[str, Any]
BOUNDARY = "differential"


def send(call: Call, server: Running) -> Answer:
    """``status``, ``headers`` and ``body`` of the answer; ``status`` says so where none came."""
    if "grpc" in call.written:
        from tests.differential.rpc import send_grpc

        return send_grpc(call, server)
    if "raw" in call.written:
        api, data, method = call.written["raw"]["api"], _raw_bytes(call.written["raw"], server), "GET"
    else:
        method, api, path = call.text.split(" ", 2)
        data = request_bytes(call, method, filled(path, server), server)
    return exchange(server, api, data, method, call.wait_s)


def exchange(server: Running, api: str, data: bytes, method: str, wait_s: float) -> Answer:
    """Sends ``data`` on a new connection and reads one answer."""
    connection: socket.socket = socket.create_connection(("127.0.0.1", server.ports[api]), timeout=wait_s)
    if server.is_tls:
        context = ssl._create_unverified_context()
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        connection = context.wrap_socket(connection)
    with connection:
        try:
            connection.sendall(data)
        except (ConnectionResetError, BrokenPipeError):
            pass  # an answer may have come before all was read
        response = http.client.HTTPResponse(connection, method=method)
        try:
            response.begin()
            body = response.read()
        except TimeoutError:
            return {"status": f"no answer within {wait_s:g} s"}
        except (http.client.HTTPException, ConnectionError) as error:
            return {"status": f"connection ended: {type(error).__name__}"}
    headers: dict[str, str] = {}
    for name, value in response.getheaders():
        headers[name.lower()] = f"{headers[name.lower()]}, {value}" if name.lower() in headers else value
    answer: Answer = {"status": f"{response.status} {response.reason}".strip(), "headers": headers}
    try:
        answer["body"] = body.decode()
    except UnicodeDecodeError:
        answer["base64"] = base64.b64encode(body).decode()
    return answer


def request_bytes(call: Call, method: str, path: str, server: Running) -> bytes:
    written = call.written
    headers = {str(name): filled(str(value), server) for name, value in written.get("headers", {}).items()}
    body = _body(written, headers, server)
    lines = [f"{method} {path} HTTP/1.1"]
    known = {name.lower() for name in headers}
    if "host" not in known:
        lines.append(f"Host: 127.0.0.1:{server.ports['inference']}")
    if "content-length" not in known and "transfer-encoding" not in known and (body or method in ("POST", "PUT")):
        lines.append(f"Content-Length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _body(written: dict[str, Any], headers: dict[str, str], server: Running) -> bytes:
    """The body's bytes; adds its content type to ``headers`` where the case gives none."""
    if "json" in written:
        headers.setdefault("Content-Type", "application/json")
        return filled(json.dumps(written["json"]), server).encode()
    if "base64" in written:
        return base64.b64decode(written["base64"])
    if "form" in written:
        headers.setdefault("Content-Type", f"multipart/form-data; boundary={BOUNDARY}")
        return b"".join(map(_part, written["form"])) + f"--{BOUNDARY}--\r\n".encode()
    return filled(str(written.get("body", "")), server).encode()


def _part(part: dict[str, Any]) -> bytes:
    """``name``, ``filename``, ``type`` and ``text`` or ``base64``; ``head`` instead gives the part's head as it is."""
    value = base64.b64decode(part["base64"]) if "base64" in part else str(part.get("text", "")).encode()
    head = part.get("head")
    if head is None:
        head = f'Content-Disposition: form-data; name="{part["name"]}"'
        if "filename" in part:
            head += f'; filename="{part["filename"]}"'
        if "type" in part:
            head += f"\r\nContent-Type: {part['type']}"
    return f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + value + b"\r\n"


def _raw_bytes(written: dict[str, Any], server: Running) -> bytes:
    """``bytes`` (a text with Python's escapes) or ``base64``."""
    if "base64" in written:
        return base64.b64decode(written["base64"])
    return filled(written["bytes"], server).encode().decode("unicode_escape").encode("latin1")


def filled(text: str, server: Running) -> str:
    """With ``{store}``, ``{folder}``, ``{key.management}``, ``{port.inference}`` and the like replaced."""
    if "{" not in text:
        return text
    text = text.replace("{store}", str(server.store)).replace("{folder}", str(server.folder))
    for api, port in server.ports.items():
        text = text.replace("{port." + api + "}", str(port))
    for scope in ("management", "inference", "API"):
        marker = "{key." + scope + "}"
        if marker in text:
            text = text.replace(marker, server.key(scope))
    return text
