"""A process with a small Ray of several nodes and Serve on it, which does what lines of JSON on its stdin say.

A process of its own, since Ray changes signals, logging and more of the one that it is started from. Started by
`tests.support.ray_nodes`.
"""

from __future__ import annotations

import json
import sys
from typing import Any


class Conductor:
    def __init__(self, port: int, host: str):
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        self.ray, self.serve = ray, serve
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000, "include_dashboard": False},
        )
        self.nodes: dict[str, Any] = {}
        ray.init(address=self.cluster.address, log_to_driver=False)
        options: dict[str, Any] = {"port": port, **({"host": host} if host else {})}
        serve.start(proxy_location="HeadOnly", http_options=options)

    def add_node(self, name: str, **resources: Any) -> int:
        """The process that all others of the node come from."""
        node = self.nodes[name] = self.cluster.add_node(object_store_memory=100_000_000, **resources)
        self.cluster.wait_for_nodes(120)
        [raylet] = node.all_processes["raylet"]
        return int(raylet.process.pid)

    def kill_node(self, name: str) -> None:
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)

    def run(self, args: dict[str, Any], name: str, prefix: str, health: list[float] | None = None) -> None:
        """``health``: period and limit of the checks, shorter than users have it."""
        import pyserve.cluster
        from pyserve.replicas import deployment

        if health:
            deployment.HEALTH_PERIOD_S, deployment.HEALTH_TIMEOUT_S = health
        self.serve.run(pyserve.cluster.app(args), name=name, route_prefix=prefix)

    def delete(self, name: str) -> None:
        self.serve.delete(name)

    def failures(self, name: str) -> dict[str, str]:
        """Why replicas of an application could not begin, by node, as ``pyserve status`` shows it."""
        control = self.ray.get_actor(f"control:{name}:pyserve", namespace="pyserve")
        found: dict[str, str] = self.ray.get(control.status.remote())["failures"]
        return found

    def states(self, name: str) -> dict[str, int]:
        """Replicas of an application by their state."""
        [deployment] = self.serve.status().applications[name].deployments.values()
        return {
            str(getattr(state, "value", state)): count for state, count in deployment.replica_states.items() if count
        }

    def stop(self) -> None:
        self.serve.shutdown()
        self.ray.shutdown()
        self.cluster.shutdown()


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr  # what Ray prints is no answer
    conductor = Conductor(int(sys.argv[1]), sys.argv[2])
    print(json.dumps({"result": "started"}), file=out, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"result": getattr(conductor, order.pop("do"))(**order)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)
    conductor.stop()


if __name__ == "__main__":
    main()
