"""A ledger of requests to a server whose device breaks again and again: their answers, and how long there were none.

python -m tests.simdev.loss_ledger --requests 100000 --breaks 100      prints what docs/operations.md says

Each request has numbers of its own, so that an answer that is another's, or comes twice, is seen. A client asks again
what was refused with 503, or where its connection ended before there was an answer, as clients of a service do.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.simdev.serving import fault, give_device
from tests.support.serving import LIMIT_S, RAW, Answer, Client, Server
from tests.support.serving_models import LINEAR_INPUT, Linear, write_torchscript

FRAGILE, OTHER, PLAIN = "fragile", "other", "plain"
DEVICES = {FRAGILE: 0, OTHER: 1, PLAIN: None}
SEEDS = {FRAGILE: 3, OTHER: 4, PLAIN: 5}


@dataclass
class Ledger:
    """What became of the requests.

    Attributes:
        statuses: answers by model and status; ``closed`` of connections that ended before there was one.
        problems: what must not be: wrong answers, refusals without the words.
        recovered_s: from a refusal to the next 200 of the model whose device broke, one for each break.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    recovered_s: list[float] = field(default_factory=list)
    asked: int = 0
    answered: int = 0

    def note(self, model: str, status: object) -> None:
        self.statuses[f"{model} {status}"] += 1


class Clients:
    """Threads that ask for all three models in turn until they are told to stop.

    Attributes:
        ledger: theirs, of all together.
    """

    def __init__(self, server: Server, count: int) -> None:
        self.ledger = Ledger()
        self._server = server
        self._networks = {name: Linear(seed) for name, seed in SEEDS.items()}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._down_since: float | None = None
        self._is_stopped = False
        self._address = server.address()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(count)]

    @contextmanager
    def running(self) -> Iterator[Clients]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._is_stopped = True
            for thread in self._threads:
                thread.join(LIMIT_S)

    def wait(self, is_so: Any, what: str) -> None:
        with self._news:
            assert self._news.wait_for(lambda: bool(self.ledger.problems) or is_so(), LIMIT_S), what
            assert not self.ledger.problems, self.ledger.problems[:3]

    def wait_for_answers(self, count: int) -> None:
        target = self.ledger.answered + count
        self.wait(lambda: self.ledger.answered >= target, "no answers")

    def _run(self, index: int) -> None:
        client = Client(self._address)
        models = list(SEEDS)
        while not self._is_stopped:
            number = next(self._numbers)  # of its own, exact in float32
            model = models[number % len(models)] if index else FRAGILE
            item = torch.tensor([float(number % 4096), float(number // 4096), 1.0, -1.0])
            with self._lock:
                self.ledger.asked += 1
            while True:
                sent_at = time.monotonic()
                try:
                    answer = client.ask("POST", f"/predictions/{model}", item.numpy().tobytes(), RAW)
                except (OSError, http.client.HTTPException):
                    client.close()
                    client = Client(self._address)
                    self._note(model, "closed")
                    continue
                if self._take(model, item, answer, sent_at):
                    break
                time.sleep(0.02)
        client.close()

    def _note(self, model: str, status: object) -> None:
        with self._news:
            self.ledger.note(model, status)

    def _take(self, model: str, item: torch.Tensor, answer: Answer, sent_at: float) -> bool:
        """Whether it is an answer; else it is to be asked again."""
        with torch.inference_mode():
            expected = self._networks[model](item.unsqueeze(0))[0]
        with self._news:
            self.ledger.note(model, answer.status)
            if answer.status == 200:
                got = torch.frombuffer(bytearray(answer.body), dtype=torch.float32)
                if not torch.allclose(got, expected, rtol=1e-5, atol=1e-3):
                    self.ledger.problems.append(f"{model}: expected {expected}, got {got}")
                self.ledger.answered += 1
                # One that was sent before may be of the process that goes.
                if model == FRAGILE and self._down_since is not None and sent_at > self._down_since:
                    self.ledger.recovered_s.append(time.monotonic() - self._down_since)
                    self._down_since = None
            elif answer.status == 503 and "retry-after" in answer.headers:
                reason = answer.detail.get("reason")
                if model == FRAGILE and reason == "device lost" and self._down_since is None:
                    self._down_since = time.monotonic()
            else:
                self.ledger.problems.append(f"{model}: {answer.status} {answer.body[:200]!r}")
            self._news.notify_all()
        return answer.status == 200


def write_models(store: Path, **more: Any) -> list[str]:
    """One on each of two devices and one on the CPU; returns the archives' names."""
    for name, device in DEVICES.items():
        place = {"deviceType": "cpu"} if device is None else {"deviceType": "gpu", "deviceIds": [device]}
        config = {"input": LINEAR_INPUT, "batchSize": 8, "maxBatchDelay": 0, **place, **more}
        write_torchscript(store, Linear(SEEDS[name]), name, config=config)
    return [f"{name}.mar" for name in DEVICES]


def keep_breaking(server: Server, *, requests: int, breaks: int, clients: int = 8, frees: str = "") -> Ledger:
    """Breaks the first device again and again, each time after some answers, until there were ``requests``."""
    with Clients(server, clients).running() as load:
        for index in range(breaks):
            load.wait_for_answers(max(8, requests // (breaks + 1)))
            pid = server.process.pid
            fault(server, *filter(None, [frees, f"break at={index % 7} device=0"]))
            load.wait(lambda seen=index: len(load.ledger.recovered_s) > seen, "the model does not come back")
            assert server.process.pid != pid
        load.wait(lambda: load.ledger.answered >= requests, "no answers")
    return load.ledger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--breaks", type=int, default=100)
    parser.add_argument("--clients", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            give_device(server, at_start="strict_free on=1")
            server.environment["PYSERVE_DEVICE_LOSSES_MAX"] = "1000000"
            server.start("--models", *write_models(server.store))
            ledger = keep_breaking(server, requests=given.requests, breaks=given.breaks, clients=given.clients)
            log = server.log()
        finally:
            server.kill()
    found = ledger.recovered_s
    print(json.dumps({
        "requests": ledger.asked, "answered": ledger.answered, "breaks": given.breaks,
        "statuses": dict(sorted(ledger.statuses.items())),
        "recovered_s": {"p50": round(statistics.median(found), 2), "max": round(max(found), 2)},
        "wrong": len(ledger.problems), "restarts that count as crashes": log.count("; restarting"),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
