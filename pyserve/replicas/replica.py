"""One replica: an engine with all models, behind its ASGI application. Nothing here imports ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyserve.embedding.application import Application, application
from pyserve.embedding.engine import EmbeddedServer
from pyserve.replicas.demand import Demands
from pyserve.replicas.direct import DirectApplication
from pyserve.serving import ServingError

# Health checks in a row that find nothing to fork workers from; when a worker is wanted, another one is started.
LOST_CHECKS_MAX = 2


class Replica:
    """What Ray Serve makes in each process of a deployment.

    Args:
        models: as of `pyserve.embedded`; paths are those of the node that the replica is on.
        config: keys of config.properties.
        cpus: that the replica may use.
        direct_port: of its own listener beside Ray's proxies; 0 for none.
    """

    def __init__(self, models: Sequence[str], config: Mapping[str, Any], cpus: int, direct_port: int = 0):
        self.engine = EmbeddedServer(models, config={"cpu_budget": cpus, **config})
        self._direct_port = direct_port
        self._demands = Demands()
        self._lost_checks = 0

    def __serve_build_asgi_app__(self) -> Application | DirectApplication:
        """Of Ray Serve, which runs its lifespan too: the engine starts and stops with the replica."""
        if self._direct_port:
            return DirectApplication(self.new_application(), self._direct_port)
        return self.new_application()

    def new_application(self) -> Application:
        """What requests through Ray reach."""
        return application(self.engine)

    async def check_health(self) -> None:
        """Ray Serve replaces a replica that raises, or that does not answer, as when its event loop is stuck.

        Raises:
            ServingError: with the reason.
        """
        if not self.engine.is_started:
            return  # its lifespan says why not
        if self.engine.problem:
            raise ServingError(self.engine.problem)
        self._lost_checks = self._lost_checks + 1 if self.engine.running.has_lost_spawner else 0
        if self._lost_checks > LOST_CHECKS_MAX:
            raise ServingError("the process that workers are forked from is gone, and no other takes its place")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `WaitPolicy` decides by: of the busiest model what arrives beside what can be done, and the wait."""
        if not self.engine.is_started:
            return {"load": 0.0, "wait_s": 0.0}
        running = self.engine.running
        load = self._demands.look(running.server.metrics, running.server.registry)
        return {"load": load, "wait_s": running.loads()[1]}
