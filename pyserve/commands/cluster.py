"""``pyserve start --cluster`` and what ``status``, ``deploy`` and ``stop`` do there.

What is done on the cluster is done by a process of its own (``pyserve.replicas.command``): Ray ends the process that it
is in when the cluster goes away, and that is then told here. A file beside the pid file says that the cluster was what
was started last, and where it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mimetypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyserve import launch
from pyserve.commands import terminal as console
from pyserve.commands.status import EXIT_NOT_RUNNING, EXIT_RUNNING, EXIT_UNKNOWN
from pyserve.commands.tables import Column, Row, cell, table_text
from pyserve.config.archive_url import is_url
from pyserve.config.config import Config
from pyserve.config.model_source import resolve_models
from pyserve.errors import ConfigError, JsonObject, ServeError
from pyserve.os_errors import cause_of
from pyserve.server import pid_file

APPLICATION = "pyserve"
COMMAND = [sys.executable, *launch.SAFE_PATH, "-m", "pyserve.replicas.command"]
INTERRUPTED_WAIT_S = 60.0
# Attributes of the flags of `start` that say what each replica is.
CLUSTER_FLAGS = (
    "replicas", "num_cpus", "num_gpus", "resources", "replicas_per_node", "target_wait_ms", "direct_port",
)  # fmt: skip
_COLUMNS = (Column("MODEL"), Column("VERSION"), Column("ARCHIVE"), Column("COMES FROM"))
_SIZE_MAX = 1 << 16


class ClusterCommandError(ServeError):
    """A command could not do it on the cluster; the text says what is served now."""


def add_cluster_argument(parser: argparse.ArgumentParser) -> None:
    """Of the commands that act on what was started."""
    parser.add_argument("--cluster", metavar="ADDRESS",
        help="on this Ray cluster: auto for the one that this machine is in, or HOST:6379; default: the one that was "
        "started last, where no server runs")  # fmt: skip


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``start``."""
    group = parser.add_argument_group("on a cluster")
    add = group.add_argument
    add("--cluster", metavar="ADDRESS",
        help='serve on this Ray cluster: auto for the one that this machine is in, or HOST:6379')  # fmt: skip
    add("--replicas", metavar="N", help="engines: 3, or 1..8 to have as many as the load needs; default: 1")
    add("--num-cpus", type=int, metavar="N", help="of each replica; default: 1")
    add("--num-gpus", type=float, metavar="N",
        help="of each replica, which uses no others: 2, or 0.5 to share one; default: none")  # fmt: skip
    add("--resource", dest="resources", action="append", metavar="NAME=AMOUNT",
        help="of each replica: another that nodes were given by `ray start --resources`; repeatable")  # fmt: skip
    add("--replicas-per-node", type=int, metavar="N", help="at most; default: as many as there is room for")
    add("--direct-port", type=int, metavar="PORT", help="of each replica's own listener, besides Ray's proxy")
    add("--timeout", type=float, metavar="S", help="how long replicas may take to be ready; default: 600")
    add("--target-wait-ms", type=float, metavar="MS",
        help="with a range: how long a request may wait before there are more replicas; default: 50")  # fmt: skip


# --- the file that says that it is a cluster ------------------------------------------------------------------------


def _note(pid_path: Path) -> Path:
    return pid_path.with_name(f"{pid_path.name.removesuffix('.pid')}.cluster")


def chosen_cluster(parsed: argparse.Namespace, pid_path: Path) -> str:
    """The address of the cluster that a command means; ``""`` if it means a server."""
    if parsed.cluster:
        return str(parsed.cluster)
    if getattr(parsed, "management", None) is not None or pid_file.read(pid_path) is not None:
        return ""
    return str(_noted(pid_path).get("address") or "")


def _noted(pid_path: Path) -> JsonObject:
    try:
        descriptor = os.open(_note(pid_path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return {}
    with open(descriptor, "rb") as file:
        if os.fstat(descriptor).st_uid not in (os.geteuid(), 0):
            return {}
        try:
            found = json.loads(file.read(_SIZE_MAX))
        except ValueError:
            return {}
    return found if isinstance(found, dict) else {}


def _write_note(pid_path: Path, address: str, url: str) -> None:
    path = _note(pid_path)
    try:
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=".cluster-")
        with open(descriptor, "w") as file:
            json.dump({"address": address, "url": url}, file)
        os.replace(draft, path)
    except OSError as error:
        console.warn(
            [f"{path} cannot be written ({cause_of(error)}); give --cluster {address} to status, deploy and stop"]
        )


# --- commands -------------------------------------------------------------------------------------------------------


def start_on_cluster(parsed: argparse.Namespace, config: Config, pid_path: Path) -> int:
    """Starts, and returns 0 when every replica answers.

    Raises:
        ServeError: why not; nothing is left of the start.
    """
    running = pid_file.read(pid_path)
    if running is not None:
        raise ConfigError(running.sentence)
    if parsed.foreground:
        raise ConfigError("--foreground does not go with --cluster: Ray keeps the replicas")
    sources = resolve_models(config.load_models, config.model_store)
    if not sources:
        raise ConfigError("name the models to serve: `pyserve start --cluster auto --models a.mar`")
    address = config.inference_address
    if address.is_unix or address.is_tls:
        raise ConfigError(f"{address} cannot be had from Ray Serve; give --inference-address http://host:port")
    arguments = {name: getattr(parsed, name) for name in CLUSTER_FLAGS} | {"resources": _resources(parsed.resources)}
    order = {
        "command": "start", "address": parsed.cluster, "application": APPLICATION,
        "models": [{"path": each.path_or_file, "name": each.name} for each in sources],
        "config": {key: _plain(getattr(config, key)) for key, place in config.origin.items() if place != "default"},
        "args": {"models": ["-"], **{key: value for key, value in arguments.items() if value is not None}},
        "host": address.host, "port": address.port, "timeout_s": parsed.timeout,
    }  # fmt: skip
    with console.Progress() as progress:
        found = _done(order, lambda text: progress.update("cluster", text))
    _write_note(pid_path, str(parsed.cluster), str(found["address"]))
    _print(found, str(parsed.cluster), str(found["address"]))
    return 0


def _resources(given: list[str] | None) -> dict[str, float] | None:
    """Raises ConfigError for what is not ``NAME=AMOUNT``."""
    if given is None:
        return None
    found = {}
    for text in given:
        name, _, amount = text.partition("=")
        try:
            found[name.strip()] = float(amount)
        except ValueError:
            name = ""
        if not name.strip():
            raise ConfigError(f"--resource {text!r}: write NAME=AMOUNT, such as --resource fast_disk=1")
    return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | dict | list) or value is None else str(value)


def status_of_cluster(address: str, pid_path: Path, *, as_json: bool) -> int:
    """Prints what is served, and returns the exit code of ``pyserve status``."""
    found = _done({"command": "status", "address": address, "application": APPLICATION})
    if as_json:
        print(json.dumps({**found, "cluster": address}, indent=2))
    elif not found["running"]:
        print(f"pyserve is not currently running on the cluster at {address}.")
    else:
        noted = _noted(pid_path)
        _print(found, address, str(noted.get("url") or "") if noted.get("address") == address else "")
    if not found["running"]:
        return EXIT_NOT_RUNNING
    return EXIT_UNKNOWN if found.get("problem") or found["status"] != "RUNNING" else EXIT_RUNNING


def _print(found: JsonObject, address: str, url: str) -> None:
    state = "" if found["status"] == "RUNNING" else f", {found['status']}"
    print(f"pyserve is running on the cluster at {address}{state} (generation {found.get('generation', '?')})")
    if url:
        print(f"inference   {url}")
    for each in found.get("deployments", {}).values():
        counts = ", ".join(f"{count} {name}" for name, count in sorted(each["replicas"].items()))
        print(f"replicas    {counts or 'none'}" + (f": {each['message']}" if each["message"] else ""))
    for replica in sorted(found.get("replicas", ()), key=lambda each: (each["node"], each["id"])):
        print(f"            {replica['node']}  {replica['id']}  generation {replica['generation']}")
    for node, reason in sorted(found.get("failures", {}).items()):
        print(f"            {node}  cannot begin: {reason}")
    if found.get("problem"):
        print(found["problem"])
    rows = [
        Row([cell(each["model"]), cell(f"{each['version']} (default)" if each["default"] else each["version"]),
             cell(each["file"]), "each node or URL" if each["durable"] else "the nodes"])
        for each in found.get("models", ())
    ]  # fmt: skip
    if rows:
        print(table_text(_COLUMNS, rows))


def deploy_on_cluster(parsed: argparse.Namespace, address: str) -> int:
    """Deploys on all replicas or on none, and says each step. Returns 0.

    Raises:
        ServeError: why not, after a line for each node that has a reason.
    """
    if parsed.workers is not None and parsed.workers < 1:
        raise ConfigError(f"--workers must be 1 or more, not {parsed.workers}: a version without workers cannot answer")
    if not parsed.timeout > 0:
        raise ConfigError(f"--timeout must be more than 0 s, not {parsed.timeout:g}")
    if parsed.sample is not None and not os.access(parsed.sample, os.R_OK):
        raise ConfigError(f"--sample {parsed.sample} cannot be read")
    kind = mimetypes.guess_type(parsed.sample)[0] if parsed.sample else None
    archive = parsed.archive if is_url(parsed.archive) else str(Path(parsed.archive).expanduser().absolute())
    done = _done({
        "command": "deploy", "address": address, "application": APPLICATION, "archive": archive, "name": parsed.name,
        "sample": parsed.sample and str(Path(parsed.sample).absolute()),
        "sample_type": kind if kind == "application/json" else "", "workers": parsed.workers,
        "keep_old": parsed.keep_old, "timeout_s": parsed.timeout,
    })  # fmt: skip
    silent = done.get("silent") or {}
    console.warn(f"{node} has not confirmed it yet: {reason}" for node, reason in sorted(silent.items()))
    if not done["replicas"]:
        console.warn(["no replica runs just now, so that none has tried it; the next ones serve it"])
    name, old, new = done["name"], done["old"], done["version"]
    print(f"{name}: " + (f"default version {old} -> {new}" if old else f"{new} is the first version that is served"))
    where = f"{done['replicas']} replicas on {done['nodes']} nodes"
    print(f"generation {done['generation']} is served by {where}, switched in {done['committed'] * 1e3:.0f} ms")
    return 0


def stop_cluster(address: str, pid_path: Path, timeout_s: float | None) -> int:
    """Ends what is served there; what was accepted is answered. The exit code of ``pyserve stop``.

    Raises:
        ServeError: it was not gone within ``timeout_s``, or the cluster went away.
    """
    found = _done({"command": "stop", "address": address, "application": APPLICATION, "timeout_s": timeout_s})
    if _noted(pid_path).get("address") == address:
        _note(pid_path).unlink(missing_ok=True)
    print(
        "pyserve has stopped." if found["running"] else f"pyserve is not currently running on the cluster at {address}."
    )
    return 0 if found["running"] else 1


# --- the process that does it ---------------------------------------------------------------------------------------


def _done(order: JsonObject, on_progress: Callable[[str], object] = bool) -> JsonObject:
    """What came of an order. Steps are printed.

    Raises:
        ServeError: it failed, or the cluster went away.
        KeyboardInterrupt: of ours; what was begun is undone.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as noise:
        child = subprocess.Popen(
            [*COMMAND, str(writing)], pass_fds=[writing], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=noise, env=launch.child_environment(), cwd=launch.child_folder(), start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(order).encode() + b"\n")
            child.stdin.flush()  # and stays open: the child sees by that that we live
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        with open(reading, encoding="utf-8") as events:
            try:
                last = _last(events, on_progress)
            except KeyboardInterrupt:
                child.send_signal(signal.SIGTERM)
                with contextlib.suppress(KeyboardInterrupt):
                    _last(events, on_progress)
                raise
            finally:
                signal.signal(signal.SIGTERM, before)
                _end(child)
        if last is None:
            raise ClusterCommandError(_gone(str(order["address"]), noise))
    if last["event"] == "failed":
        for line in last.get("lines", ()):
            print(line, file=sys.stderr)
        raise ClusterCommandError(str(last["reason"]))
    return last


def _last(events: Any, on_progress: Callable[[str], object]) -> JsonObject | None:
    for line in events:
        found: JsonObject = json.loads(line)
        if found["event"] == "say":
            print(found["text"], flush=True)
        elif found["event"] == "progress":
            on_progress(str(found["text"]))
        else:
            return found
    return None


def _end(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    try:
        child.wait(INTERRUPTED_WAIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _gone(address: str, noise: Any) -> str:
    noise.seek(0)
    lines = [line.strip() for line in noise.read().decode(errors="replace").splitlines() if line.strip()]
    said = f" ({lines[-1][:300]})" if lines else ""
    return (
        f"the cluster at {address} went away meanwhile{said}; once it is back `pyserve status --cluster {address}` "
        "says what is served"
    )
