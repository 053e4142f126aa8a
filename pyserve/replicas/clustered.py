"""A replica that serves what its cluster serves: `Replica`, whose models come from the control."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyserve import devices
from pyserve.embedding.application import Application
from pyserve.embedding.engine import EmbeddedServer
from pyserve.embedding.http_call import HttpCall, Message, Receive, Send
from pyserve.embedding.http_scope import Scope
from pyserve.errors import ServeError
from pyserve.http1.connections import Connections
from pyserve.replicas.actor import RayLink, actor_name
from pyserve.replicas.managing import ManagedRegistry
from pyserve.replicas.member import Member
from pyserve.replicas.replica import Replica
from pyserve.request.exchange import Exchange
from pyserve.serving import ServingError

GENERATION_HEADER = b"pyserve-generation"


def base_of(models: Sequence[str]) -> str:
    """What tells applications with other models apart."""
    return "models-" + hashlib.sha256(json.dumps(list(models)).encode()).hexdigest()[:16]


class ClusterReplica(Replica):
    """See `Replica`.

    Args:
        base: of a cluster whose control was told by a command what to serve; by default that is ``models``.
        gpus: that Ray has given it; it begins only if torch sees them, and uses none if there are none.
    """

    def __init__(
        self, models: Sequence[str], config: Mapping[str, Any], cpus: int, *, base: str = "", direct_port: int = 0,
        gpus: float = 0.0,
    ):  # fmt: skip
        # Ray hides what it does not give, by variables: today, on CUDA, and unless it is told not to.
        own: dict[str, Any] = {"cpu_budget": cpus, **({} if gpus else {"number_of_gpu": 0}), **config}
        super().__init__(models, own, cpus, direct_port)
        self.member = new_member(base or base_of(models))
        self.is_managed = bool(config.get("enable_model_api"))
        self.engine = MemberEngine(models, own, self.member, gpus)

    def new_application(self) -> Application:
        # Where others may register models, all of management is for them; it asks for the key that all replicas have.
        names = ["inference", "management", "metrics"] if self.is_managed else ["inference", "metrics"]
        return GenerationApplication(self.engine, names, lambda: self.member.generation)

    async def check_health(self) -> None:
        """Also raises if this replica cannot serve what the cluster serves: another one may."""
        await super().check_health()
        if self.member.problem:
            raise ServingError(self.member.problem)


def new_member(base: str) -> Member:
    """The part of this process, which Ray Serve has made as a replica."""
    import ray
    from ray import serve

    context = serve.get_replica_context()
    link = RayLink(actor_name(context.app_name, context.deployment))
    node = f"{ray.util.get_node_ip_address()} (node {ray.get_runtime_context().get_node_id()[:6]})"
    return Member(link, id=context.replica_tag, node=node, base=base)


def check_gpus(gpus: float) -> None:
    """Models would be served on the CPU, correctly and far too slowly: another node may have what is asked for.

    Args:
        gpus: as Ray counts them, parts of one too.

    Raises:
        ServingError: torch sees fewer.
    """
    seen = devices.count()
    if seen < math.ceil(gpus):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        variable = "" if visible is None else f", with CUDA_VISIBLE_DEVICES={visible}"
        raise ServingError(
            f"num_gpus is {gpus:g}, and torch sees {seen or 'no'} GPU{'s' if seen > 1 else ''} on this node{variable}; "
            "see `pyserve doctor` there, or start without num_gpus to serve on CPUs"
        )


class MemberEngine(EmbeddedServer):
    """An engine whose models are its cluster's.

    Args:
        gpus: see `ClusterReplica`.
    """

    def __init__(self, models: Sequence[str], config: Mapping[str, Any], member: Member, gpus: float = 0.0):
        super().__init__((), config=config)
        self._given = models
        self._member = member
        self._gpus = gpus

    async def start(self) -> None:
        """Returns when it serves what the cluster does.

        Raises:
            ServingError: it cannot.
        """
        try:
            await self._begin()
        except (ServeError, ServingError) as error:
            reason = error.reason() if isinstance(error, ServeError) else str(error)
            await self._member.fail(reason)
            await super().stop()
            raise ServingError(reason) from None
        except BaseException:
            await super().stop()
            raise

    async def _begin(self) -> None:
        await asyncio.to_thread(check_gpus, self._gpus)
        is_told = await self._member.committed()
        if not is_told:
            self._models = list(self._given)
        await super().start()
        running = self.running
        self._check_keys()
        managed = ManagedRegistry(running.server.registry, self._member)
        self._member.on_generation = running.server.join_cluster(managed)
        await self._member.join(running, () if is_told else self._given)

    def _check_keys(self) -> None:
        """Raises ServingError if Ray lets this replica listen for everybody."""
        config = self.running.config
        if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1" or config.disable_token_authorization is True:
            return
        if not config.token_file or "inference" not in self.keys:
            raise ServingError(
                "with RAY_SERVE_ENABLE_HA_PROXY=1 replicas listen on all interfaces, and config has no token_file with "
                "a key for inference: give the same file on every node, or disable_token_authorization: true if "
                "everybody who reaches the nodes may predict"
            )

    async def stop(self) -> None:
        """Takes part in the cluster no more, and ends as any engine."""
        await self._member.leave()
        await super().stop()


class GenerationApplication(Application):
    """An application whose answers say which generation of what the cluster serves they are of."""

    def __init__(self, engine: EmbeddedServer, names: Sequence[str], generation: Callable[[], int]):
        super().__init__(engine, names)
        self._generation = generation

    def _new_call(
        self, router: Callable[[Exchange], None], connections: Connections, scope: Scope, receive: Receive, send: Send
    ) -> HttpCall:
        label = _Label(router, send, self._generation)
        return HttpCall(label.app, connections, scope, receive, label.send)


class _Label:
    """Of one request: the generation at the time when its model was looked up, in a header of its answer."""

    def __init__(self, router: Callable[[Exchange], None], send: Send, generation: Callable[[], int]):
        self._router = router
        self._send = send
        self._generation = generation
        self._noted = generation()

    def app(self, exchange: Exchange) -> None:
        self._noted = self._generation()
        self._router(exchange)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"].append((GENERATION_HEADER, str(self._noted).encode()))
        await self._send(message)
