"""Starts and stops a server from Python, as TorchServe's tests do."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from queue import Queue

MANAGEMENT = "http://127.0.0.1:8081"


def start(  # noqa: PLR0917 - TorchServe's signature
    model_store: str | None = None, snapshot_file: str | None = None, no_config_snapshots: bool = False,
    plugin_folder: str | None = None, disable_token: bool = False, models: str | None = None,
    enable_model_api: bool = False,
) -> Queue[str]:  # fmt: skip
    """Starts a server and returns, once it answers, what it printed, line by line.

    Raises:
        RuntimeError: it did not start; the text says why.
    """
    command = [sys.executable, "-m", "pyserve", "start"]
    for flag, value in (("--model-store", model_store), ("--ts-config", snapshot_file), ("--models", models)):
        if value:
            command += [flag, value]
    for flag, wanted in (("--ncs", no_config_snapshots), ("--disable-token-auth", disable_token),
                         ("--enable-model-api", enable_model_api)):  # fmt: skip
        if wanted:
            command.append(flag)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the server did not start: {done.stderr.strip()}")
    lines: Queue[str] = Queue()
    for line in done.stdout.splitlines():
        lines.put(line)
    return lines


def stop(wait: bool = True) -> None:
    """Stops the server."""
    process = subprocess.Popen([sys.executable, "-m", "pyserve", "stop"])
    if wait:
        process.wait()


def register_model(model_name: str, url: str) -> tuple[int, str]:
    """Registers an archive with one worker. Returns status and body."""
    return register_model_with_params(
        {"model_name": model_name, "url": url, "initial_workers": "1", "synchronous": "true"}
    )


def register_model_with_params(params: Mapping[str, str]) -> tuple[int, str]:
    """``POST /models`` with these parameters. Returns status and body."""
    request = urllib.request.Request(f"{MANAGEMENT}/models?{urllib.parse.urlencode(dict(params))}", method="POST")
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        body = error.read().decode()
        return error.code, json.loads(body).get("message", body) if body.startswith("{") else body
