"""Starts and stops a server from Python, as TorchServe's scripts and tests do."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from queue import Queue
from typing import IO, Any

from pyserve.config.address import Address
from pyserve.server import pid_file

COMMAND = [sys.executable, "-m", "pyserve.commands.torchserve"]
STARTED = "Model server started."
MANAGEMENT_DEFAULT = "http://127.0.0.1:8081"


@dataclass
class Response:
    """An answer of the management API, with the names that `requests` has for its parts."""

    status_code: int
    content: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status_code < 400

    @property
    def reason(self) -> str:
        return http.client.responses.get(self.status_code, "")

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body, read as JSON.

        Raises:
            ValueError: it is none.
        """
        return json.loads(self.content)

    def raise_for_status(self) -> None:
        """Raises RuntimeError for an error, with its body."""
        if not self.ok:
            raise RuntimeError(f"{self.status_code} {self.reason}: {self.text.strip()}")


def start(  # noqa: PLR0917 - TorchServe's signature
    model_store: str | None = None, snapshot_file: str | None = None, no_config_snapshots: bool = False,
    plugin_folder: str | None = None, disable_token: bool = False, models: str | None = None,
    enable_model_api: bool = False,
) -> Queue[str]:  # fmt: skip
    """Starts a server; returns once it answers, with a queue of the lines that it prints from then on.

    Raises:
        RuntimeError: it did not start; the text is what it printed.
    """
    command = [*COMMAND, "--start"]
    for flag, value in (("--model-store", model_store), ("--ts-config", snapshot_file), ("--models", models),
                        ("--plugins-path", plugin_folder)):  # fmt: skip
        if value:
            command += [flag, str(value)]
    for flag, wanted in (("--ncs", no_config_snapshots), ("--disable-token-auth", disable_token),
                         ("--enable-model-api", enable_model_api)):  # fmt: skip
        if wanted:
            command.append(flag)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    lines: Queue[str] = Queue()
    printed = []
    for line in process.stdout:
        lines.put(line)
        printed.append(line)
        if line.rstrip() == STARTED:
            threading.Thread(target=_pass_on, args=(process, process.stdout, lines), daemon=True).start()
            return lines
    process.stdout.close()
    raise RuntimeError(f"the server did not start (exit code {process.wait()}): {''.join(printed).strip()}")


def _pass_on(process: subprocess.Popen[str], stream: IO[str], lines: Queue[str]) -> None:
    """Until the server ends, which has the same standard output as the command that started it."""
    with stream:
        for line in stream:
            lines.put(line)
    process.wait()


def stop(wait: bool = True) -> None:
    """Stops the server."""
    process = subprocess.Popen([*COMMAND, "--stop"])
    if wait:
        process.wait()


def register_model(model_name: str, url: str) -> Response:
    """Registers an archive with one worker."""
    return register_model_with_params(
        {"model_name": model_name, "url": url, "initial_workers": "1", "synchronous": "true"}
    )


def register_model_with_params(params: Mapping[str, str] | list[tuple[str, str]]) -> Response:
    """``POST /models`` with these parameters, to the server that runs here."""
    pairs = params.items() if isinstance(params, Mapping) else params
    request = urllib.request.Request(f"{_management()}/models?{urllib.parse.urlencode(list(pairs))}", method="POST")
    try:
        with urllib.request.urlopen(request) as answer:
            return Response(answer.status, answer.read(), dict(answer.headers))
    except urllib.error.HTTPError as error:
        with error:
            return Response(error.code, error.read(), dict(error.headers))


def _management() -> str:
    running = pid_file.read(pid_file.default_path())
    address = running.addresses.get("management") if running is not None else None
    return Address.parse(address, 0).client_url if address else MANAGEMENT_DEFAULT
