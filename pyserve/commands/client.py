"""How the command line talks to a running server: over TCP, TLS or a unix socket, with its key."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pyserve.config.address import Address
from pyserve.security.tokens import read_keys

ANSWER_TIMEOUT_S = 5.0
ANSWER_SIZE_MAX = 16 << 20


class ApiAnswer(NamedTuple):
    """An answer; ``json`` is None when the body is none."""

    status: int
    reason: str
    json: Any
    body: bytes

    @property
    def text(self) -> str:
        """What an error says, in one line: its message, and the cause if the answer has one."""
        if not isinstance(self.json, dict):
            return f"{self.status} {self.reason}".rstrip()
        detail = self.json.get("detail")
        detail = detail if isinstance(detail, dict) else {}
        message = str(self.json.get("message", self.reason)).rstrip(".")
        causes = (detail.get("exception"), detail.get("text") or detail.get("reason"), detail.get("where"))
        cause = ": ".join(str(each) for each in causes if each and str(each) not in message)
        fix = detail.get("fix")
        return f"{self.status} {message}" + (f" ({cause})" if cause else "") + (f"; {fix}" if fix else "")


class Connection(http.client.HTTPConnection):
    """HTTP to an ``Address``, unix sockets and TLS included.

    Args:
        key: shown with every request; ``""`` for none.
        checks_certificate: whether it must be signed by somebody whom this machine trusts, for the address's host.
        timeout_s: of each wait for the other side.
    """

    def __init__(
        self, address: Address, key: str = "", *, checks_certificate: bool = False,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ):  # fmt: skip
        super().__init__(address.host or "localhost", address.port or None, timeout=timeout_s)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._address = address
        self._checks_certificate = checks_certificate

    def connect(self) -> None:
        if not self._address.is_unix:
            super().connect()
            if self._address.is_tls:
                context = ssl.create_default_context()
                if not self._checks_certificate:
                    context.check_hostname = False
                    context.verify_mode = ssl.CERT_NONE
                self.sock = context.wrap_socket(self.sock, server_hostname=self._address.host)
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._address.path)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, *,
        size_max: int = ANSWER_SIZE_MAX,
    ) -> ApiAnswer:  # fmt: skip
        """One request and its whole answer, of which ``size_max`` bytes are read.

        Raises:
            OSError, http.client.HTTPException: there is none.
        """
        self.request(method, path, body, {**self.headers, **(headers or {})})
        answer = self.getresponse()
        content = answer.read(size_max)
        try:
            parsed = json.loads(content)
        except ValueError:
            parsed = None
        return ApiAnswer(answer.status, answer.reason, parsed, content)


def local_address(text: str) -> Address:
    """The address that a server listens at, as a client on this machine reaches it."""
    address = Address.parse(text, 0)
    return address if address.is_unix else Address.parse(address.client_url, 0)


def management_key(file: str) -> str:
    """The key of management calls, of a server's file of keys; ``""`` if it has none.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not file:
        return ""
    key = read_keys(Path(file)).get("management")
    return "" if key is None else key.text
