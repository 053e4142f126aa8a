"""``pyserve predict``: sends a file to a model of the running server, and prints the answer."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import mimetypes
import sys
from pathlib import Path
from urllib.parse import quote

from pyserve.commands.client import Connection, local_address
from pyserve.commands.escaping import unescaped
from pyserve.commands.model_arguments import UsageError
from pyserve.config.address import Address
from pyserve.errors import ConfigError, ServeError
from pyserve.regular_file import read_whole
from pyserve.security.tokens import read_keys
from pyserve.server import pid_file

TIMEOUT_S = 300.0
STDIN = "-"
# To somebody who reads the answer numbers are none in memory.
READABLE = "application/json, */*;q=0.5"
_TEXT_TYPES = {".json": "application/json", ".txt": "text/plain"}


class PredictError(ServeError):
    """There is no answer, or it is an error."""


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; ``--pid-file`` comes from the command line itself."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="its name, or NAME/VERSION")
    add("-i", "--input", metavar="FILE", help="body of the request; - is standard input")
    add("--json-body", metavar="JSON", help="body of the request, sent as JSON")
    add("--content-type", metavar="TYPE", help="default: by the file's name")
    add("-o", "--output", metavar="FILE", help="where the answer goes; default: standard output")
    add("--url", metavar="URL", help="of the server's predictions; default: of the one that the pid file names")
    add("--token", metavar="KEY", help="for predictions; default: of the server's key file")
    add("--timeout", type=float, metavar="S", default=TIMEOUT_S, help=f"in s (default {TIMEOUT_S:g})")


def predict_command(parsed: argparse.Namespace, pid_path: Path) -> int:
    """Prints the answer's body as it is. Exit code: 0, or 1 with what the server says on stderr.

    Raises:
        UsageError: there is nothing to send.
        ServeError, OSError: there is no server, or it answers with an error.
    """
    body, content_type = _body(parsed)
    address, key = predictions_of(parsed, pid_path)
    name, _, version = parsed.model.partition("/")
    path = f"/predictions/{quote(name, safe='')}" + (f"/{quote(version, safe='')}" if version else "")
    headers = {"Content-Type": content_type} if content_type else {}
    out = unescaped(sys.stdout)
    if not parsed.output and out.isatty():
        headers["Accept"] = READABLE
    connection = Connection(address, key, checks_certificate=bool(parsed.url), timeout_s=parsed.timeout)
    with contextlib.closing(connection):
        try:
            connection.request("POST", path, body, {**connection.headers, **headers})
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise PredictError(f"{address.client_url} does not answer: {reason}; see `pyserve status`") from None
    if answer.status >= 400:
        raise PredictError(_told(answer.status, answer.reason, content))
    if parsed.output:
        Path(parsed.output).write_bytes(content)
        return 0
    if out.isatty() and not _is_text(content):
        raise PredictError(f"the answer is {len(content)} bytes of binary data; give a file for it with -o FILE")
    buffer = getattr(out, "buffer", None)
    if buffer is not None and not out.isatty():
        out.flush()
        buffer.write(content)
        buffer.flush()
    else:
        print(content.decode("utf-8", "replace"))  # escaped, on a terminal
    return 0


def _body(parsed: argparse.Namespace) -> tuple[bytes, str]:
    """What is sent, and as what."""
    if (parsed.input is None) == (parsed.json_body is None):
        raise UsageError("what is to be sent? give a file with -i FILE (- is standard input), or JSON with --json-body")
    if parsed.json_body is not None:
        try:
            json.loads(parsed.json_body)
        except ValueError as error:
            raise UsageError(f"--json-body {parsed.json_body!r} is not JSON: {error}") from None
        return parsed.json_body.encode(), parsed.content_type or "application/json"
    if parsed.input == STDIN:
        body = sys.stdin.buffer.read()
        return body, parsed.content_type or ("application/json" if _is_json(body) else "")
    path = Path(parsed.input)
    try:
        body = read_whole(path)
    except OSError as error:
        raise UsageError(f"the input {path} cannot be read: {error.strerror}") from None
    return body, parsed.content_type or content_type_of(path)


def content_type_of(path: Path) -> str:
    """By the file's name; ``""`` if that does not say."""
    return _TEXT_TYPES.get(path.suffix.lower()) or mimetypes.guess_type(path.name)[0] or ""


def predictions_of(parsed: argparse.Namespace, pid_path: Path) -> tuple[Address, str]:
    """Where predictions are asked for, and with which key: what ``--url`` and ``--token`` say, or the pid file.

    Raises:
        UsageError: the URL is none, or the key or the content type can be in no header.
        ConfigError: no server is running.
    """
    for flag, text in (("--token", parsed.token), ("--content-type", parsed.content_type)):
        if text and not (text.isascii() and text.isprintable()):
            raise UsageError(f"{flag} has characters that a header cannot carry; give printable ASCII")
    if parsed.url:
        try:
            return Address.parse(parsed.url, 8080), parsed.token or ""
        except ValueError as error:
            raise UsageError(f"--url {parsed.url!r}: {error}") from None
    running = pid_file.read(pid_path)
    if running is None:
        raise ConfigError("no server is running here; start one with `pyserve start`, or name another with --url")
    key = None if parsed.token or not running.key_file else read_keys(Path(running.key_file)).get("inference")
    return local_address(running.addresses["inference"]), parsed.token or ("" if key is None else key.text)


def _told(status: int, reason: str, content: bytes) -> str:
    """What an error's answer says, in one line."""
    try:
        told = json.loads(content)
        detail = told.get("detail") or {}
        causes = [detail.get(name) for name in ("exception", "text", "where", "fix")]
        more = "; ".join(str(each) for each in causes if each)
        return f"{status} {told.get('message', reason)}" + (f" ({more})" if more else "")
    except (ValueError, AttributeError):
        return f"{status} {reason}"


def _is_json(body: bytes) -> bool:
    if body.lstrip()[:1] not in (b"{", b"[", b'"'):
        return False
    try:
        json.loads(body)
    except ValueError:
        return False
    return True


def _is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False
