"""The process that workers are forked from: killed, killed again and again, or standing still."""

from __future__ import annotations

import contextlib
import signal
import time

from tests.chaos.fault import PYTHON_MODELS, Fault, worker_down
from tests.chaos.site import send


class KillZygote(Fault):
    """The zygote gets SIGKILL, and with it all workers end."""

    name = "kill-zygote"

    def prepare(self) -> None:
        self.costs = worker_down(*PYTHON_MODELS)

    def inject(self) -> None:
        send(self.site.zygote, signal.SIGKILL)


class KillZygotes(Fault):
    """Three zygotes in a row, each as soon as it is there."""

    name, weight = "kill-zygote-thrice", 4
    COUNT = 3

    def prepare(self) -> None:
        self.costs = worker_down(*PYTHON_MODELS)

    def inject(self) -> None:
        killed: set[int] = set()
        deadline = time.monotonic() + 20
        while len(killed) < self.COUNT and time.monotonic() < deadline:
            with contextlib.suppress(LookupError):
                zygote = self.site.zygote
                if zygote.pid not in killed:
                    send(zygote, signal.SIGKILL)
                    killed.add(zygote.pid)
            time.sleep(0.01)
        assert len(killed) == self.COUNT, f"only {len(killed)} zygotes came in 20 s"


class StopZygote(Fault):
    """The zygote stands still while a worker is killed: another one can come only afterwards."""

    name = "stop-zygote"

    def prepare(self) -> None:
        self.model = self.chance.choice(PYTHON_MODELS)
        self.costs = worker_down(self.model)

    def inject(self) -> None:
        pids = self.site.worker_pids(self.model)
        self.pid = self.site.zygote.pid
        send(self.pid, signal.SIGSTOP)
        pid = self.chance.choice(pids)
        send(pid, signal.SIGKILL)
        self.noted_death(pid, self.model, was_last=len(pids) == 1)

    def heal(self) -> None:
        send(self.pid, signal.SIGCONT)
