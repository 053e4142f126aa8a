"""``pyserve status``: is a server running, where does it listen, and how are its models?"""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyserve.commands.client import Connection, local_address, management_key
from pyserve.commands.model_table import print_models
from pyserve.config.address import Address
from pyserve.errors import ConfigError, JsonObject
from pyserve.server import pid_file

EXIT_RUNNING = 0
EXIT_NOT_RUNNING = 3
EXIT_UNKNOWN = 4
"""As LSB init scripts do: 4 when the supervisor runs and the server does not answer."""


def print_status(pid_path: Path, *, as_json: bool = False) -> int:
    """Print what is known and return the exit code: 0 running, 3 not running, 4 running without an answer.

    Args:
        as_json: one object: ``running``, ``pid``, ``addresses``, ``log`` and ``models``, with the columns of the table.

    Raises:
        ConfigError: the pid file cannot be trusted.
    """
    running = pid_file.read(pid_path)
    if as_json:
        return _print_json(running)
    if running is None:
        print("pyserve is not currently running.")
        return EXIT_NOT_RUNNING
    print(f"pyserve is running (pid {running.pid})")
    width = max(10, *map(len, running.addresses))
    for name, text in running.addresses.items():
        print(f"{name:<{width}}  {text}")
    if running.log_file:
        print(f"{'log':<{width}}  {running.log_file}")
    rows, problem = _rows(running)
    if problem:
        print(problem)
        return EXIT_UNKNOWN
    if rows:
        print_models(rows)
    else:
        print("no model is loaded")
    return EXIT_RUNNING


def _print_json(running: pid_file.RunningServer | None) -> int:
    if running is None:
        print(json.dumps({"running": False}, indent=2))
        return EXIT_NOT_RUNNING
    rows, problem = _rows(running)
    said = {"running": True, "pid": running.pid, "addresses": dict(running.addresses), "log": running.log_file or None,
            "models": rows}  # fmt: skip
    print(json.dumps({**said, "problem": problem} if problem else said, indent=2))
    return EXIT_UNKNOWN if problem else EXIT_RUNNING


def _rows(running: pid_file.RunningServer) -> tuple[list[JsonObject], str]:
    """A row for each version, and why there are none; ``""`` if there is no reason."""
    try:
        rows = model_rows(
            local_address(running.addresses["management"]),
            running.addresses.get("inference", ""),
            management_key(running.key_file),
        )
    except (ConfigError, OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        return [], f"the management address gives no list of models: {error or type(error).__name__}"
    return rows + _failed_rows(local_address(running.addresses["inference"]), {str(row["model"]) for row in rows}), ""


def model_rows(management: Address, inference: str, key: str = "") -> list[JsonObject]:
    """One row for every version of every model, as the management API describes them.

    Args:
        key: that management calls need; ``""`` for none.

    Raises:
        OSError, http.client.HTTPException, ValueError: no answer, or one that is no description.
    """
    connection = Connection(management, key)
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
            is_one = len(described) == 1
            asked = described if is_one else _get(connection, f"/models/{quote(name, safe='')}")
            default = asked[0].get("modelVersion")
            rows += [row_of(version, inference, is_default=version.get("modelVersion") == default, is_one=is_one)
                     for version in described]  # fmt: skip
        return rows
    finally:
        connection.close()


def _failed_rows(inference: Address, known: set[str]) -> list[JsonObject]:
    """Archives that could not even be opened at start: the management API does not list them, ``/ready`` does."""
    connection = Connection(inference)
    try:
        reasons = connection.ask("GET", "/ready").json.get("models", {}).items()
        return [{"model": name, **reason} for name, reason in reasons if name not in known]
    except (OSError, http.client.HTTPException, ValueError, AttributeError, TypeError):
        return []
    finally:
        connection.close()


def _get(connection: Connection, path: str) -> Any:
    answer = connection.ask("GET", path)
    if answer.status != 200:
        raise ValueError(answer.text)
    if answer.json is None:
        raise ValueError("no JSON")
    return answer.json


def row_of(version: JsonObject, inference: str, *, is_default: bool = True, is_one: bool = True) -> JsonObject:
    """A row of the table, of what the management API says of a version; with its URL if ``inference`` is an address."""
    workers = version.get("workers", [])
    ready = sum(worker.get("status") == "READY" for worker in workers)
    wanted = int(version.get("minWorkers", 0))
    name = version.get("modelName")
    address = Address.parse(inference, 0) if inference else None
    url = "" if address is None else f"{address.client_url}/predictions/{quote(str(name), safe='')}"
    return {
        "model": name,
        "version": version.get("modelVersion"),
        "default": is_default,
        "shown": f"{version.get('modelVersion')} (default)" if is_default and not is_one else None,
        "state": _state(str(version.get("state", "READY")), ready, wanted, is_scaling=version.get("isScaling", False)),
        "workers": f"{ready}/{wanted}",
        "device": version.get("deviceType"),
        "batch": version.get("batchSize"),
        "url": url,
        "error": version.get("error"),
    }


def _state(state: str, ready: int, wanted: int, *, is_scaling: bool) -> str:
    """The model's own state; one that is READY as far as its workers are.

    Args:
        is_scaling: those that are missing are on their way because somebody asked for more; none was lost.
    """
    if state != "READY":
        return state
    if is_scaling and ready != wanted:
        return "SCALING" if ready else "STARTING"
    if wanted == 0 and ready == 0:
        return "NO WORKERS"
    if ready == 0:
        return "NOT READY"
    return "READY" if ready >= wanted else "DEGRADED"
