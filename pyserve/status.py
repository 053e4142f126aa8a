"""``pyserve status``: is a server running, where does it listen, and how are its models?"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyserve import console, pid_file
from pyserve.address import Address
from pyserve.errors import ConfigError, JsonObject
from pyserve.tokens import read_keys

ANSWER_TIMEOUT_S = 5.0
ANSWER_SIZE_MAX = 16 << 20

EXIT_RUNNING = 0
EXIT_NOT_RUNNING = 3
EXIT_UNKNOWN = 4
"""As LSB init scripts do: 4 when the supervisor runs and the server does not answer."""


class _Connection(http.client.HTTPConnection):
    """HTTP to an ``Address``, unix sockets and TLS included.

    The certificate is not checked: it need not be for this machine's own name, and the address is from our pid file.
    """

    def __init__(self, address: Address, key: str = ""):
        super().__init__(address.host or "localhost", address.port or None, timeout=ANSWER_TIMEOUT_S)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._address = address

    def connect(self) -> None:
        if not self._address.is_unix:
            super().connect()
            if self._address.is_tls:
                context = ssl.create_default_context()
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
                self.sock = context.wrap_socket(self.sock)
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._address.path)


def print_status(pid_path: Path) -> int:
    """Print what is known and return the exit code: 0 running, 3 not running, 4 running without an answer.

    Raises:
        ConfigError: the pid file cannot be trusted.
    """
    running = pid_file.read(pid_path)
    if running is None:
        print("pyserve is not currently running.")
        return EXIT_NOT_RUNNING
    print(f"pyserve is running (pid {running.pid})")
    for name, text in running.addresses.items():
        print(f"{name:<10}  {text}")
    if running.log_file:
        print(f"{'log':<10}  {running.log_file}")
    try:
        rows = model_rows(
            _local(running.addresses["management"]), running.addresses.get("inference", ""), _key(running.key_file)
        )
    except (ConfigError, OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        print(f"the management address gives no list of models: {error or type(error).__name__}")
        return EXIT_UNKNOWN
    rows += _failed_rows(_local(running.addresses["inference"]), {str(row["model"]) for row in rows})
    print("\n".join(console.table_lines(rows)) if rows else "no model is loaded")
    return EXIT_RUNNING


def model_rows(management: Address, inference: str, key: str = "") -> list[JsonObject]:
    """One row for every version of every model, as the management API describes them.

    Args:
        key: that management calls need; ``""`` for none.

    Raises:
        OSError, http.client.HTTPException, ValueError: no answer, or one that is no description.
    """
    connection = _Connection(management, key)
    try:
        names: list[str] = []
        token = ""
        while True:
            page = _get(connection, f"/models?limit=100{token}")
            names += [str(model["modelName"]) for model in page["models"]]
            if not page["models"] or "nextPageToken" not in page:
                break
            token = "&next_page_token=" + quote(str(page["nextPageToken"]))
        rows = []
        for name in names:
            described = _get(connection, f"/models/{quote(name, safe='')}/all")
            rows += [_row(version, inference) for version in described]
        return rows
    finally:
        connection.close()


def _failed_rows(inference: Address, known: set[str]) -> list[JsonObject]:
    """Archives that could not even be opened at start: the management API does not list them, ``/ready`` does."""
    connection = _Connection(inference)
    try:
        connection.request("GET", "/ready")
        answer = json.loads(connection.getresponse().read(ANSWER_SIZE_MAX))
        reasons = answer.get("models", {}).items()
        return [{"model": name, **reason} for name, reason in reasons if name not in known]
    except (OSError, http.client.HTTPException, ValueError, AttributeError, TypeError):
        return []
    finally:
        connection.close()


def _local(text: str) -> Address:
    """The address, as a client on this machine reaches it."""
    address = Address.parse(text, 0)
    return address if address.is_unix else Address.parse(address.client_url, 0)


def _key(file: str) -> str:
    """The key of management calls.

    Raises:
        ConfigError: the file of keys cannot be read.
    """
    if not file:
        return ""
    key = read_keys(Path(file)).get("management")
    return "" if key is None else key.text


def _get(connection: _Connection, path: str) -> Any:
    connection.request("GET", path, headers=connection.headers)
    answer = connection.getresponse()
    body = answer.read(ANSWER_SIZE_MAX)
    if answer.status != 200:
        try:
            told = json.loads(body)
            reason = f"{told['message']} ({told['detail']['reason']})" if answer.status == 401 else told["message"]
        except (ValueError, KeyError, TypeError):
            reason = answer.reason
        raise ValueError(f"{answer.status} {reason}")
    return json.loads(body)


def _row(version: JsonObject, inference: str) -> JsonObject:
    workers = version.get("workers", [])
    ready = sum(worker.get("status") == "READY" for worker in workers)
    wanted = int(version.get("minWorkers", 0))
    name = version.get("modelName")
    address = Address.parse(inference, 0) if inference else None
    url = "" if address is None else f"{address.client_url}/predictions/{quote(str(name), safe='')}"
    return {
        "model": name,
        "version": version.get("modelVersion"),
        "state": _state(str(version.get("state", "READY")), ready, wanted),
        "workers": f"{ready}/{wanted}",
        "device": version.get("deviceType"),
        "batch": version.get("batchSize"),
        "url": url,
        "error": version.get("error"),
    }


def _state(state: str, ready: int, wanted: int) -> str:
    """The model's own state; one that is READY as far as its workers are."""
    if state != "READY":
        return state
    if wanted == 0 and ready == 0:
        return "NO WORKERS"
    if ready == 0:
        return "NOT READY"
    return "READY" if ready >= wanted else "DEGRADED"
