"""The end of what is served on a cluster: its replicas, its control, and the archives that nodes keep for them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from typing import Any

from pyserve.replicas.archives import NodeArchives

# Of Ray Serve: how it names replicas, and where.
SERVE_NAMESPACE = "serve"
REPLICA_PREFIX = "SERVE_REPLICA::"
LOOK_S = 0.5
# For tasks on all nodes, which have to start a process first.
FORGET_S = 60.0
KEYS_S = 10.0


def end_application(application: str, limit_s: float) -> bool:
    """Has replicas answer what they have accepted, and end; whether they have.

    One that was told so before is ended at once: as a second ``pyserve stop`` ends a server.
    """
    from ray import serve

    ends_at = time.monotonic() + limit_s
    is_first = True
    while True:
        with contextlib.suppress(Exception):  # of a Ray that is busy with something else
            served = serve.status().applications.get(application)
            if served is None:
                return True
            if is_first and str(getattr(served.status, "value", served.status)) == "DELETING":
                _kill_replicas(application)
            is_first = False
            serve.delete(application, _blocking=False)
        if time.monotonic() > ends_at:
            return False
        time.sleep(LOOK_S)


def _kill_replicas(application: str) -> None:
    import ray

    for name in _actors(SERVE_NAMESPACE, f"{REPLICA_PREFIX}{application}#"):
        with contextlib.suppress(ValueError):  # it has just ended
            ray.kill(ray.get_actor(name, namespace=SERVE_NAMESPACE))


def _actors(namespace: str, prefix: str) -> list[str]:
    from ray.util import list_named_actors

    return [
        each["name"] for each in list_named_actors(all_namespaces=True)
        if each["namespace"] == namespace and each["name"].startswith(prefix)
    ]  # fmt: skip


def end_controls(application: str) -> bool:
    """Ends the control of an application that has no replicas any more, of whatever deployment, and has nodes remove
    what they keep for it alone. Whether there was one."""  # fmt: skip
    from pyserve.replicas.actor import NAMESPACE, actor_name, end_control

    ours = set(_actors(NAMESPACE, actor_name(application, "")))
    others = set(_actors(NAMESPACE, actor_name("", "").rstrip(":"))) - ours
    keys = _keys_of(ours)
    keys -= _keys_of(others) if keys else set()
    for name in ours or {actor_name(application, "pyserve")}:  # what a dead one has written down goes, too
        end_control(name)
    if keys:
        _forget(keys)
    return bool(ours)


def _keys_of(names: Collection[str]) -> set[str]:
    import ray

    from pyserve.replicas.actor import control_of

    found: set[str] = set()
    for name in names:
        with contextlib.suppress(Exception):  # one that does not answer keeps nobody from ending
            found |= set(ray.get(control_of(name).archive_keys.remote(), timeout=KEYS_S))
    return found


def _forget(keys: Collection[str]) -> None:
    """Has every node remove archives; one that cannot removes them when it serves the next time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remove: Any = ray.remote(num_cpus=0, max_retries=0)(remove_here)
    with contextlib.suppress(Exception):
        tasks = [
            remove.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                sorted(keys)
            )
            for node in ray.nodes() if node["Alive"]
        ]  # fmt: skip
        ray.wait(tasks, num_returns=len(tasks), timeout=FORGET_S)


def remove_here(keys: Collection[str]) -> None:
    """Of the node that it runs on."""
    NodeArchives().remove(keys)
