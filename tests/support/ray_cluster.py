"""A cluster of Ray on this machine: a head without CPUs and nodes with one each, kept by a process of its own.

Ray changes signals, logging and more of the process that it is started from. `RayCluster` is what tests have of it; run
as a program, this file is that process: it takes words on stdin, and answers each with a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
# It gives itself 30 s to start, which is little beside other tests.
RAY_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_gcs_server_request_timeout_seconds": "180",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
STORE_SIZE = 100_000_000


class RayCluster:
    """A context.

    Args:
        folder: each node's archive cache is a folder of its name in there.
        nodes: names of the nodes with a CPU.
    """

    def __init__(self, folder: Path, nodes: tuple[str, ...] = ("one", "two")):
        self.folder = folder
        self._errors = (folder / "ray.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder), *nodes], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, cwd=folder, env=self.environment(), text=True,
        )  # fmt: skip
        self.address = str(self._answer()["address"])

    def environment(self) -> dict[str, str]:
        """Of processes that are to reach it."""
        return {**os.environ, "PYTHONPATH": str(ROOT), "PYSERVE_CACHE": str(self.folder / "command"), **RAY_VARIABLES}

    def do(self, word: str, **arguments: Any) -> dict[str, Any]:
        """See `_Program`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": word, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                assert "error" not in found, found["error"]
                return found
        raise AssertionError((self.folder / "ray.log").read_text(errors="replace")[-3000:])

    def command(self, *arguments: str, limit_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """A command of pyserve on it, whose files are in ``folder``."""
        return subprocess.run(
            [sys.executable, "-m", "pyserve", *arguments, "--pid-file", str(self.folder / "pid")], capture_output=True,
            text=True, timeout=limit_s, check=False, cwd=self.folder, env=self.environment(),
        )  # fmt: skip

    def kill(self) -> None:
        """All nodes, at once: none of them sees another one's end."""
        pids = self.do("processes")["pids"]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


class _Program:
    """What the process does."""

    def __init__(self, folder: Path, names: list[str]):
        import ray
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": STORE_SIZE, "include_dashboard": False,
                            "env_vars": self._variables(folder, "head")},
        )  # fmt: skip
        self._nodes = {name: self._added(folder, name) for name in names}
        ray.init(address=self._cluster.address, namespace="tests", log_to_driver=False)
        self.address = self._cluster.address

    @staticmethod
    def _variables(folder: Path, name: str) -> dict[str, str]:
        return {"PYSERVE_CACHE": str(folder / name), "PYSERVE_TEST_NODE": name}

    def _added(
        self, folder: Path, name: str, variables: Mapping[str, str] | None = None, **resources: Any
    ) -> Any:  # fmt: skip
        return self._cluster.add_node(
            **{"num_cpus": 1, **resources}, object_store_memory=STORE_SIZE,
            env_vars={**self._variables(folder, name), **(variables or {})},
        )  # fmt: skip

    def kill_actor(self, name: str, namespace: str) -> dict[str, Any]:
        """As if its process had died: Ray starts it again."""
        import ray

        ray.kill(ray.get_actor(name, namespace=namespace), no_restart=False)
        return {}

    def kill_replica(self) -> dict[str, Any]:
        """One of them, by its process; which is returned."""
        import psutil

        for process in psutil.process_iter(["cmdline"]):
            title = " ".join(process.info["cmdline"] or ())
            if title.startswith("ray::ServeReplica:pyserve") and process.ppid() in self._raylets():
                process.kill()
                return {"pid": process.pid}
        raise RuntimeError("there is no replica")

    def _raylets(self) -> set[int]:
        found = set()
        for node in (self._cluster.head_node, *self._nodes.values()):
            found |= {each.process.pid for each in node.all_processes["raylet"]}
        return found

    def add(self, folder: str, name: str, **more: Any) -> dict[str, Any]:
        """A node, with other resources than a CPU and more variables of the environment."""
        self._nodes[name] = self._added(Path(folder), name, **more)
        return {}

    def actors(self) -> dict[str, Any]:
        """Names of those that live longer than a command."""
        from ray.util import list_named_actors

        return {"names": sorted(each["name"] for each in list_named_actors(all_namespaces=True))}

    def run(self, args: dict[str, Any], port: int) -> dict[str, Any]:
        """The application as a Serve config has it, not as a command starts it."""
        import pyserve.cluster

        serve = self._serve()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(pyserve.cluster.app(args), name="pyserve", route_prefix="/")
        return {}

    def delete(self) -> dict[str, Any]:
        """What ``serve delete`` does."""
        self._serve().delete("pyserve")
        return {}

    def states(self) -> dict[str, Any]:
        """Replicas by their state."""
        application = self._serve().status().applications.get("pyserve")
        deployments = application.deployments.values() if application else ()
        return {
            str(getattr(state, "value", state)): count
            for each in deployments for state, count in each.replica_states.items() if count
        }  # fmt: skip

    @staticmethod
    def _serve() -> Any:
        """Ray Serve, whose controller may be another one by now."""
        from ray import serve
        from ray.serve import context

        context._set_global_client(None)
        return serve

    def processes(self) -> dict[str, Any]:
        """Of all nodes, the head's first: who kills them has ended the cluster, and this process with it."""
        nodes = (self._cluster.head_node, *self._nodes.values())
        return {"pids": [each.process.pid for node in nodes for found in node.all_processes.values() for each in found]}

    def stored(self) -> dict[str, Any]:
        """Bytes of the object stores that are in use."""
        import ray

        time.sleep(0.5)
        return {"bytes": 3 * STORE_SIZE - ray.available_resources().get("object_store_memory", 0)}

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()


def main() -> None:
    folder, *names = sys.argv[1:]
    program = _Program(Path(folder), names)
    try:
        print(json.dumps({"address": program.address}), flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer = getattr(program, order.pop("do"))(**order)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
    finally:
        program.close()


if __name__ == "__main__":
    main()
