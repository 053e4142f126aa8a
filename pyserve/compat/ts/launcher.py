"""Starts and stops a server from Python, as TorchServe's scripts and tests do."""

from __future__ import annotations

import http.client
import itertools
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Queue
from subprocess import PIPE, STDOUT
from typing import Any

from pyserve.config.address import Address
from pyserve.server import pid_file

COMMAND = [sys.executable, "-m", "pyserve.commands.torchserve"]
STARTED = "Model server started."
MANAGEMENT_DEFAULT = "http://127.0.0.1:8081"

Params = Mapping[str, Any] | Sequence[tuple[str, Any]]


@dataclass
class Response:
    """An answer of the management API, with the names that `requests` has for its parts."""

    status_code: int
    content: bytes
    headers: dict[str, str] = field(default_factory=dict)
    url: str = ""

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


class Tee(threading.Thread):
    """Puts the lines of ``reader`` into two queues, ``queue1`` and ``queue2``, and None behind the last."""

    def __init__(self, reader: Iterable[Any]):
        super().__init__(daemon=True)
        self.reader = reader
        self.queue1: Queue[Any] = Queue()
        self.queue2: Queue[Any] = Queue()

    def run(self) -> None:
        for line in itertools.chain(self.reader, [None]):
            self.queue1.put(line)
            self.queue2.put(line)


class PrintTillTheEnd(threading.Thread):
    """Prints the lines of a queue until there is a None."""

    def __init__(self, queue: Queue[Any]):
        super().__init__(daemon=True)
        self._lines = queue

    def run(self) -> None:
        while (line := self._lines.get()) is not None:
            print(line.strip())


def start(  # noqa: PLR0917 - TorchServe's signature
    model_store: str | None = None, snapshot_file: str | None = None, no_config_snapshots: bool = False,
    plugin_folder: str | None = None, disable_token: bool = False, models: str | None = None,
    enable_model_api: bool = False,
) -> Queue[str | None]:  # fmt: skip
    """Stops the server that runs here, if one does, and starts another.

    What it prints is printed here. Returns once it answers, with a queue of the lines that come from then on; None
    stands behind the last. If it does not start, the reason is printed and the queue holds None only.
    """
    stop()
    command = [*COMMAND, "--start"]
    for flag, value in (("--model-store", model_store), ("--ts-config", snapshot_file), ("--models", models),
                        ("--plugins-path", plugin_folder)):  # fmt: skip
        if value:
            command += [flag, str(value)]
    for flag, wanted in (("--ncs", no_config_snapshots), ("--disable-token-auth", disable_token),
                         ("--enable-model-api", enable_model_api)):  # fmt: skip
        if wanted:
            command.append(flag)
    process = subprocess.Popen(command, stdout=PIPE, stderr=STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    for line in process.stdout:
        print(line.strip())
        if line.strip() == STARTED:
            break
    tee = Tee(process.stdout)
    tee.start()
    PrintTillTheEnd(tee.queue2).start()
    threading.Thread(target=process.wait, daemon=True).start()
    return tee.queue1


def stop(wait: bool = True) -> None:
    """Stops the server that runs here; ``wait``: until it has ended."""
    process = subprocess.Popen([*COMMAND, "--stop"])
    if wait:
        process.wait()


def register_model(model_name: str, url: str) -> Any:
    """Registers an archive with one worker, and waits for it.

    Returns:
        the answer: of the package `requests` if that is installed, else a `Response`.
    """
    return register_model_with_params(
        (("model_name", model_name), ("url", url), ("initial_workers", "1"), ("synchronous", "true"))
    )


def register_model_with_params(params: Params) -> Any:
    """``POST /models`` with these parameters, to the server that runs here.

    Returns:
        the answer: of the package `requests` if that is installed, else a `Response`.
    """
    url = f"{_management()}/models"
    try:
        import requests
    except ImportError:
        return _post(url, params)
    return requests.post(url, params=params)


def _post(url: str, params: Params) -> Response:
    pairs = list(params.items() if isinstance(params, Mapping) else params)
    request = urllib.request.Request(f"{url}?{urllib.parse.urlencode(pairs)}", method="POST")
    try:
        with urllib.request.urlopen(request) as answer:
            return Response(answer.status, answer.read(), dict(answer.headers), request.full_url)
    except urllib.error.HTTPError as error:
        with error:
            return Response(error.code, error.read(), dict(error.headers), request.full_url)


def _management() -> str:
    running = pid_file.read(pid_file.default_path())
    address = running.addresses.get("management") if running is not None else None
    return Address.parse(address, 0).client_url if address else MANAGEMENT_DEFAULT
