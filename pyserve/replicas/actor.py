"""The control of a cluster as an actor of Ray that belongs to nobody's process, and the links to it.

It is where Ray's own state is, and begins again with what it wrote down last: into the store of that, which lives as
long as the cluster, or longer where Ray keeps it in Redis.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pyserve.errors import ServeError
from pyserve.replicas.archives import NodeArchives
from pyserve.replicas.control import Control
from pyserve.replicas.link import LinkError
from pyserve.replicas.stock import Stock

NAMESPACE = "pyserve"
# A resource that Ray gives to the node of its own state.
HEAD = "node:__internal_head__"
# Each replica has one poll under way, and some have answers.
CALLS_MAX = 10_000


class ControlActor(Control):
    """What Ray makes.

    Args:
        name: of the actor.
    """

    def __init__(self, name: str):
        import ray

        super().__init__(
            lambda content: _Kept().put(name, content),
            _Kept().get(name),
            Stock(NodeArchives(), lambda data: [ray.put(data)]),
        )


class _Kept:
    """What lies in the cluster's own store, by name. Blocks."""

    def __init__(self) -> None:
        from ray.experimental import internal_kv

        self._store = internal_kv

    def get(self, name: str) -> bytes | None:
        found: bytes | None = self._store._internal_kv_get(name.encode(), namespace=NAMESPACE)
        return found

    def put(self, name: str, content: bytes) -> None:
        self._store._internal_kv_put(name.encode(), content, overwrite=True, namespace=NAMESPACE)

    def remove(self, name: str) -> None:
        self._store._internal_kv_del(name.encode(), namespace=NAMESPACE)


def actor_name(application: str, deployment: str) -> str:
    return f"control:{application}:{deployment}"


def control_of(name: str) -> Any:
    """The actor of this name; None if there is none."""
    import ray

    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def new_control(name: str) -> Any:
    """The actor of this name, made if there is none: beside Ray's own state, without which nothing can be done."""
    import ray

    is_marked = any(HEAD in node["Resources"] for node in ray.nodes() if node["Alive"])
    return (
        ray.remote(ControlActor)
        .options(
            name=name, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0, max_restarts=-1,
            max_concurrency=CALLS_MAX, resources={HEAD: 0.001} if is_marked else None,
        )
        .remote(name)
    )  # fmt: skip


def end_control(name: str) -> None:
    """Ends the actor, and forgets what it wrote down. Does nothing if there is none."""
    import ray

    actor = control_of(name)
    if actor is not None:
        ray.kill(actor, no_restart=True)
    _Kept().remove(name)


class RayLink:
    """See `Link`. One that finds no actor makes it again."""

    def __init__(self, name: str):
        self._name = name
        self._actor: Any = None

    async def call(self, method: str, *arguments: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(new_control, self._name)
            return await getattr(self._actor, method).remote(*arguments)
        except RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ServeError):
                raise cause from None
            raise
        except (RayError, ValueError, ConnectionError) as error:
            self._actor = None
            raise LinkError(str(error).partition("\n")[0]) from None

    async def taken(self, shared: Any) -> bytes:
        from ray.exceptions import RayError

        try:
            data: bytes = await shared[0]
        except RayError as error:
            raise LinkError(str(error).partition("\n")[0]) from None
        return data
