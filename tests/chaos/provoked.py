"""What is done while a disk is full or a folder gone, so that the server has to write or read there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.chaos.fault import PYTHON_MODELS, SERVER_DOWN, worker_down
from tests.chaos.ledger import Cost
from tests.chaos.site import kill

if TYPE_CHECKING:
    from tests.chaos.fault import Fault


class Nothing:
    """The traffic alone."""

    name = "nothing"

    def __init__(self, fault: Fault):
        self.site = fault.site
        self.fault = fault
        self.costs: tuple[Cost, ...] = ()

    def begin(self) -> None:
        """While the fault lasts."""

    def end(self) -> None:
        """When it is over: what was changed is changed back, which must succeed."""


class WorkerKilled(Nothing):
    """A worker is killed, so that another has to be started."""

    name = "kill a worker"

    def __init__(self, fault: Fault):
        super().__init__(fault)
        self._model = fault.chance.choice(PYTHON_MODELS)
        self.costs = worker_down(self._model)

    def begin(self) -> None:
        self.fault.kill_workers(self._model)


class Scaled(Nothing):
    """A change that has to be written down; whatever is answered, afterwards it is asked for again."""

    name = "scale"

    def begin(self) -> None:
        answer = self.site.ask("PUT", "/models/echo?min_worker=3&max_worker=3", port="management")
        assert answer.status in (200, 202, 500, 507), f"scaling was answered with {answer.status} {answer.body!r}"

    def end(self) -> None:
        self.site.manage("PUT", "/models/echo?min_worker=2&max_worker=2&synchronous=true")


class ServerKilled(Nothing):
    """The server is killed and has to come back from what is kept."""

    name = "kill the server"

    def __init__(self, fault: Fault):
        super().__init__(fault)
        self.costs = SERVER_DOWN

    def begin(self) -> None:
        kill(self.site.process.pid)


PROVOKED: list[type[Nothing]] = [Nothing, WorkerKilled, WorkerKilled, Scaled, Scaled, ServerKilled]
