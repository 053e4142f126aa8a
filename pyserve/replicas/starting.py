"""``pyserve start --cluster``: the archives to the cluster, the application onto Ray Serve, or all of it undone."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from pyserve.embedding.settings import engine_config, process_keys
from pyserve.errors import ConfigError, JsonObject
from pyserve.replicas.arguments import Arguments
from pyserve.replicas.bringing import bring, looked_at
from pyserve.replicas.deployment import deployment
from pyserve.replicas.fitting import Node, check_fits
from pyserve.replicas.ray_words import ended
from pyserve.replicas.session import END_S, LOOK_S, ClusterError, Session
from pyserve.replicas.state import Entry, State


def start(session: Session) -> JsonObject:
    """Returns when every replica of the least number answers.

    Raises:
        ServeError: why not. Nothing is left of the start.
    """
    order = session.order
    config = {key: value for key, value in dict(order["config"]).items() if key not in process_keys(order["config"])}
    arguments = Arguments.of({**order["args"], "config": config})
    engine_config(config, None)
    looked = [looked_at(each["path"], each.get("name"), config) for each in order["models"]]
    entries = tuple(entry for entry, _ in looked)
    _check_unlike(entries)
    session.connect()
    served = session.served()
    if served is not None:
        raise ConfigError(
            "pyserve serves on this cluster already; change a model with `pyserve deploy`, end it with `pyserve stop`"
        )
    _check_room(arguments, sum(entry.size for entry in entries))
    base = f"command-{os.urandom(8).hex()}"
    with _undone_on_failure(session):
        _begin(session, base, looked, entries)
        serve_address = _run(session, arguments, base)
        _wait(session, arguments)
    return {"address": serve_address, **session.look()}


def _check_unlike(entries: tuple[Entry, ...]) -> None:
    seen: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        other = seen.setdefault(entry.key, entry)
        if other is not entry:
            raise ConfigError(f"{other.file} and {entry.file} are both {entry.shown}; pack one with another --version")


def _check_room(arguments: Arguments, size: int) -> None:
    import ray

    nodes = [_node(each) for each in ray.nodes() if each["Alive"]]
    check_fits(
        nodes, ray.available_resources(), needs=arguments.needs, replicas=arguments.replicas_min, size=size,
        per_node=arguments.replicas_per_node,
    )  # fmt: skip


def _node(told: Mapping[str, Any]) -> Node:
    resources = told["Resources"]
    others = {name: float(amount) for name, amount in resources.items() if name not in ("CPU", "memory")}
    return Node(
        str(told["NodeManagerAddress"]), float(resources.get("CPU", 0)), int(resources.get("memory", 0)), others
    )


def _begin(session: Session, base: str, looked: list[Any], entries: tuple[Entry, ...]) -> None:
    """The control, the archives, and what is to be served."""
    from pyserve.replicas.actor import end_control, new_control

    end_control(session.control_name)  # of one that ended otherwise than by `pyserve stop`
    control = new_control(session.control_name)
    for entry, path in looked:
        if path is not None:
            session.tell("progress", text=f"bringing {entry.file} ({entry.size >> 20} MB)")
            bring(entry, path, control, session.get)
    session.get(control.seed.remote(State.first(base, entries).to_json()))


def _run(session: Session, arguments: Arguments, base: str) -> str:
    """Has Ray Serve run the application; where it answers."""
    from dataclasses import replace

    from ray import serve

    host, port = session.order["host"], int(session.order["port"])
    serve.start(http_options={"host": host, "port": port})
    application = deployment(replace(arguments, models=(), base=base))
    serve.run_many(
        [serve.RunTarget(application, name=session.application, route_prefix="/")],
        wait_for_applications_running=False,
    )
    return f"http://{host}:{port}"


def _wait(session: Session, arguments: Arguments) -> None:
    ends_at = time.monotonic() + float(session.order.get("timeout_s") or 600.0)
    while True:
        served = session.served()
        status = str(getattr(served.status, "value", served.status)) if served is not None else "gone"
        deployments = list(served.deployments.values()) if served is not None else []
        message = " ".join(ended(each.message) for each in deployments if each.message) or (
            ended(served.message) if served is not None else ""
        )
        if status == "RUNNING":
            return
        failures = session.get(session.control().status.remote())["failures"] if served is not None else {}
        if failures:  # Ray Serve would try again for minutes
            lines = [f"{node}: {reason}" for node, reason in sorted(failures.items())]
            raise ClusterError("the replicas cannot be started; nothing is left of the start", lines)
        if status in ("DEPLOY_FAILED", "gone", "UNHEALTHY"):
            raise ClusterError(f"the replicas cannot be started: {message or status}; nothing is left of the start")
        if time.monotonic() > ends_at:
            raise ClusterError(f"the replicas were not ready in time; raise --timeout: {message or status}")
        running = sum(count for each in deployments for state, count in each.replica_states.items()
                      if str(getattr(state, "value", state)) == "RUNNING")  # fmt: skip
        session.tell("progress", text=f"{running} of {arguments.replicas_min} replicas are ready")
        time.sleep(LOOK_S)


@contextlib.contextmanager
def _undone_on_failure(session: Session) -> Any:
    from ray import serve

    from pyserve.replicas.ending import end_application, end_controls

    others = set(serve.status().applications)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # half of it undone would be worse
        end_application(session.application, END_S)
        with contextlib.suppress(Exception):
            end_controls(session.application)
        with contextlib.suppress(Exception):
            if not others:
                serve.shutdown()
        raise
