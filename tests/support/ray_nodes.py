"""A small Ray with Serve for tests, in a process of its own: see `tests.support.ray_conductor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.ports import free_port
from tests.support.serving import ROOT, Answer

LIMIT_S = 240.0
# It gives itself 30 s to start, and its proxy 5 s to answer, which is little beside other tests.
RAY_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_gcs_server_request_timeout_seconds": "180",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_DEDUP_LOGS": "0",
}


class RayNodes:
    """A context. A head without CPUs, and the nodes that are added.

    Args:
        folder: for its log.
        variables: of the environment of all its processes.
        paths: that they import from, too.
        host: that Serve's HTTP listens on; ``""`` for Ray's default.

    Attributes:
        port: of Ray's proxy, on loopback.
        folder: as it was given.
    """

    def __init__(
        self, folder: Path, variables: Mapping[str, str] | None = None, paths: Sequence[str] = (),
        host: str = "127.0.0.1",
    ):  # fmt: skip
        self.folder = folder
        self.port = free_port()
        self._log = folder / "ray.log"
        environment = {
            **os.environ,
            **RAY_VARIABLES,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *paths]),
            **(variables or {}),
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.ray_conductor", str(self.port), host], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment,
            )  # fmt: skip
        self._answer()

    def __enter__(self) -> RayNodes:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(120)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"Ray's process has ended:\n{self._log.read_text()[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise AssertionError(f"{answer['error']}\n{self._log.read_text()[-3000:]}")
        return answer["result"]

    def do(self, what: str, **arguments: Any) -> Any:
        """What the method of `Conductor` returns."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, *,
        port: int | None = None, limit_s: float = LIMIT_S,
    ) -> Answer:  # fmt: skip
        """Through Ray's proxy, or of another port of this machine."""
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=limit_s)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def running(self, name: str) -> int:
        return int(self.do("states", name=name).get("RUNNING", 0))

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}\n{self._log.read_text()[-3000:]}"
            time.sleep(0.25)
