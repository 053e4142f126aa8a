"""Worker processes that are killed, or stand still."""

from __future__ import annotations

import json
import signal

from tests.chaos.fault import PYTHON_MODELS, Fault, worker_down
from tests.chaos.site import send


class KillWorker(Fault):
    """One worker gets SIGKILL; what it ran may fail, nothing else."""

    name, weight = "kill-worker", 25

    def prepare(self) -> None:
        self.model = self.chance.choice(PYTHON_MODELS)
        self.costs = worker_down(self.model)

    def inject(self) -> None:
        self.kill_workers(self.model)


class KillWorkers(Fault):
    """All workers of a model get SIGKILL at once."""

    name = "kill-workers"

    def prepare(self) -> None:
        self.model = self.chance.choice(PYTHON_MODELS)
        self.costs = worker_down(self.model)

    def inject(self) -> None:
        self.kill_workers(self.model, count=10)


class StopWorker(Fault):
    """One worker stands still for a while; its requests wait for it."""

    name, weight, is_harmless = "stop-worker", 15, True

    def prepare(self) -> None:
        self.model = self.chance.choice(PYTHON_MODELS)

    def inject(self) -> None:
        self.pid = self.chance.choice(self.site.worker_pids(self.model))
        send(self.pid, signal.SIGSTOP)

    def heal(self) -> None:
        send(self.pid, signal.SIGCONT)


class Poison(Fault):
    """A request that kills its worker; the requests of its batch are run again."""

    name = "poison"

    def inject(self) -> None:
        order = json.dumps({"kill": "SIGKILL"}).encode()
        answer = self.site.ask("POST", "/predictions/echo", order, {"Content-Type": "application/json"})
        assert answer.status == 500, f"the request that killed its worker was answered with {answer.status}"
