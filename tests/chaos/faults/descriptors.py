"""No descriptor is left in the running server, while it has to start a worker and clients connect."""

from __future__ import annotations

import contextlib
import resource
import socket

import psutil

from tests.chaos import ledger
from tests.chaos.fault import PYTHON_MODELS, Fault, worker_down
from tests.chaos.ledger import Cost
from tests.chaos.site import kill


class FewDescriptors(Fault):
    """The limit of the running server falls to what it has open and a few more; a worker is killed."""

    name = "few-descriptors"
    CONNECTIONS = 24

    def prepare(self) -> None:
        self._model = self.chance.choice(PYTHON_MODELS)
        self._spare = self.chance.randrange(0, 20)
        self._connections: list[socket.socket] = []
        # A connection above the limit is told so; or waits in the backlog and is served later.
        self.costs = (*worker_down(self._model), Cost(ledger.REFUSED, statuses=(503,)))
        self.provokes = f"{self._spare} descriptors are left"

    def inject(self) -> None:
        self._process = self.site.process
        pids = self.site.worker_pids(self._model)  # while it can still be asked
        self._before = self._process.rlimit(resource.RLIMIT_NOFILE)
        self._process.rlimit(resource.RLIMIT_NOFILE, (self._process.num_fds() + self._spare, self._before[1]))
        for _ in range(self.CONNECTIONS):
            with contextlib.suppress(OSError):
                self._connections.append(socket.create_connection(self.site.address(), 1))
        pid = self.chance.choice(pids)
        self.note_deaths(self._model, [pid], were_last=len(pids) == 1)
        kill(pid)

    def heal(self) -> None:
        for connection in self._connections:
            connection.close()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.rlimit(resource.RLIMIT_NOFILE, self._before)
