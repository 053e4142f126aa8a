"""The process that workers are forked from: killed, killed again and again, or standing still."""

from __future__ import annotations

import contextlib
import signal
import time

import psutil

from tests.chaos.fault import PYTHON_MODELS, Fault, worker_down
from tests.chaos.site import kill, send


class KillZygote(Fault):
    """The zygote gets SIGKILL, and with it all workers end."""

    name = "kill-zygote"

    def prepare(self) -> None:
        self.costs = worker_down(*PYTHON_MODELS)

    def inject(self) -> None:
        zygote, workers = self.site.zygote, self.site.workers()
        pids = {model: self.site.worker_pids(model) for model in PYTHON_MODELS}
        for model in PYTHON_MODELS:
            self.note_deaths(model, pids[model], were_last=True)
        kill(zygote.pid)
        psutil.wait_procs(workers, timeout=10)


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
            with contextlib.suppress(LookupError, psutil.Error):
                zygote = self.site.zygote
                if zygote.pid not in killed:
                    kill(zygote.pid)
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
        self.pid = self.site.zygote.pid
        send(self.pid, signal.SIGSTOP)
        self.kill_workers(self.model)

    def heal(self) -> None:
        send(self.pid, signal.SIGCONT)
