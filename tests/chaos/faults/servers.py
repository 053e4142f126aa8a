"""The server and its supervisor: killed, or standing still."""

from __future__ import annotations

import signal

from tests.chaos import ledger
from tests.chaos.fault import ALL_DOWN, SERVER_DOWN, Fault
from tests.chaos.ledger import Cost
from tests.chaos.site import kill, send


class KillServer(Fault):
    """The server gets SIGKILL; its supervisor starts another one on the same sockets."""

    name, weight = "kill-server", 4

    def prepare(self) -> None:
        self.costs = SERVER_DOWN

    def inject(self) -> None:
        kill(self.site.process.pid)


class StopServer(Fault):
    """The server stands still for a while; everybody waits."""

    name = "stop-server"

    def inject(self) -> None:
        self.pid = self.site.process.pid
        send(self.pid, signal.SIGSTOP)

    def heal(self) -> None:
        send(self.pid, signal.SIGCONT)


class KillSupervisor(Fault):
    """The supervisor gets SIGKILL; the server ends with it, and the init system starts both again."""

    name, weight = "kill-supervisor", 3

    def prepare(self) -> None:
        self.costs = ALL_DOWN

    def inject(self) -> None:
        kill(self.site.supervisor.pid)


class StopSupervisor(Fault):
    """The supervisor stands still; nobody notices."""

    name, weight, is_harmless = "stop-supervisor", 5, True

    def inject(self) -> None:
        self.pid = self.site.supervisor.pid
        send(self.pid, signal.SIGSTOP)

    def heal(self) -> None:
        send(self.pid, signal.SIGCONT)


class KillServerBehindStoppedSupervisor(Fault):
    """The server gets SIGKILL while its supervisor stands still: clients wait in the backlog until it looks."""

    name, weight = "kill-server-supervisor-stopped", 2

    def prepare(self) -> None:
        self.costs = SERVER_DOWN

    def inject(self) -> None:
        self.pid = self.site.supervisor.pid
        send(self.pid, signal.SIGSTOP)
        kill(self.site.process.pid)

    def heal(self) -> None:
        send(self.pid, signal.SIGCONT)


class Restart(Fault):
    """The init system stops and starts the server: what was accepted is answered."""

    name, weight = "restart", 3

    def prepare(self) -> None:
        # Requests written to a kept connection while the server closes it come back unanswered.
        self.costs = (*ALL_DOWN, Cost(ledger.REFUSED, statuses=(503,)))

    def inject(self) -> None:
        send(self.site.supervisor, signal.SIGTERM)
