"""What becomes of clients when a device breaks: a server of its own for each fault, and requests all the while."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.gpu_steps import archives
from bench.gpu_steps import device as on_device
from bench.gpu_steps.settings import Emit, Lacks, Row, Settings
from bench.servers import Server, pyserve

CLIENT_COUNT = 8
RAW = {"Content-Type": "application/octet-stream"}
START_S = 60.0
RECOVERY_S = 20.0
BAD_WORD = 1 << 20
SIMULATED_MEMORY = 48_000_000
UNANSWERED = 0


def run(settings: Settings, emit: Emit) -> None:
    """A row per fault."""
    device = on_device.accelerator()
    for fault in (out_of_memory, broken_device, killed_worker):
        folder = settings.folder / fault.__name__
        folder.mkdir()
        try:
            emit({"fault": fault.__name__, **fault(folder, device)})
        except Exception as error:  # the other faults are tried
            emit({"fault": fault.__name__, "failed": f"{type(error).__name__}: {str(error)[:200]}"})


def started(server: Server, model: str, body: bytes) -> None:
    """Waits for the first answer; raises if the model is not on the device, where nothing would be shown."""
    server.first_answer_s(model, body, START_S)
    if not all(worker["gpu"] for worker in server.describe(model)["workers"]):
        raise RuntimeError("it is served on the CPU")


@dataclass
class Clients:
    """Clients that ask one after the other; ``answers`` has (when it was sent, when it ended, status)."""

    server: Server
    path: str
    body: bytes
    answers: list[tuple[float, float, int]] = field(default_factory=list)
    pings: list[int] = field(default_factory=list)

    @contextmanager
    def asking(self, count: int) -> Iterator[None]:
        """``count`` of them, and one that asks for ``/ping``, until the end of the block."""
        ended = threading.Event()

        def ask() -> None:
            while not ended.is_set():
                sent = time.perf_counter()
                status, _ = self.server.ask("POST", self.server.inference_port, self.path, self.body, RAW)
                self.answers.append((sent, time.perf_counter(), status))
                if status != 200:
                    time.sleep(0.01)

        def ping() -> None:
            while not ended.is_set():
                self.pings.append(self.server.ask("GET", self.server.inference_port, "/ping")[0])
                time.sleep(0.02)

        threads = [threading.Thread(target=ask) for _ in range(count)] + [threading.Thread(target=ping)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join()

    def wait_for(self, after: float, count: int = 20) -> float | None:
        """Seconds until the first of ``count`` answers 200 to requests sent after then; ``None`` if none come."""
        while time.perf_counter() < after + RECOVERY_S:
            good = [ended for sent, ended, status in list(self.answers) if status == 200 and sent > after]
            if len(good) >= count:
                return round(min(good) - after, 3)
            time.sleep(0.02)
        return None

    def after(self, moment: float) -> dict[str, int]:
        """How often each status came for what was under way then, or was sent later."""
        counts = Counter(status for _, ended, status in self.answers if ended > moment)
        return {str(status) if status else "unanswered": count for status, count in sorted(counts.items())}


def out_of_memory(folder: Path, device: torch.device) -> Row:
    """A request that no memory is enough for, four that only fit one by one, and small ones again."""
    is_real = device.type == "cuda"
    whole = on_device.whole_memory(device) if is_real else (0, SIMULATED_MEMORY)
    if whole is None:
        raise Lacks(f"the size of the memory of {device.type}")
    total = whole[1]
    text = "input: {dtype: float32, shape: [-1]}\ndeviceType: gpu\nbatchSize: 4\nminWorkers: 1\nmaxWorkers: 1\n"
    model = archives.scripted(folder, "square", archives.Square())
    archive = archives.pack(folder, "square", text, handler="tensor", model=model)
    variables = {} if is_real else {"SIMDEV_START": f"memory bytes={SIMULATED_MEMORY}"}

    def body(share: float) -> bytes:
        """Needs that share of the device's memory."""
        return torch.ones(int((share * total / 4) ** 0.5)).numpy().tobytes()

    with pyserve(folder / "server", [archive], variables=variables) as server:
        started(server, "square", small := body(1e-6))

        def ask(content: bytes) -> int:
            return server.ask("POST", server.inference_port, "/predictions/square", content, RAW)[0]

        too_large = ask(body(1.5))
        together = Counter[int]()
        threads = [threading.Thread(target=lambda: together.update([ask(body(0.3))])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        again = [ask(small) for _ in range(5)]
    row: Row = {"too_large": too_large, "four_of_0.3": {str(k): v for k, v in together.items()}, "then": again}
    if too_large != 507 or together != {200: 4} or again != [200] * 5:
        row["failed"] = "expected 507, then 200 for all others"
    return row


def broken_device(folder: Path, device: torch.device) -> Row:
    """A request that breaks the device under the requests of eight clients: who is answered, and how soon again."""
    is_real = device.type == "cuda"
    text = "input: {dtype: int64, shape: [4]}\ndeviceType: gpu\nbatchSize: 8\nminWorkers: 1\nmaxWorkers: 1\n"
    model = archives.scripted(folder, "words", archives.Words())
    archive = archives.pack(folder, "words", text, handler="tensor", model=model)
    faults = folder / "faults"
    variables = {} if is_real else {"SIMDEV_FAULTS": str(faults), "SIMDEV_START": "strict_free"}
    good = torch.arange(4).numpy().tobytes()
    with pyserve(folder / "server", [archive], variables=variables) as server:
        started(server, "words", good)
        clients = Clients(server, "/predictions/words", good)
        with clients.asking(CLIENT_COUNT):
            time.sleep(0.5)
            clients.pings.clear()
            moment = time.perf_counter()
            if is_real:
                bad = torch.tensor([0, 1, 2, BAD_WORD]).numpy().tobytes()
                culprit = server.ask("POST", server.inference_port, "/predictions/words", bad, RAW)[0]
            else:
                culprit = UNANSWERED
                replaced = faults.with_suffix(".new")
                replaced.write_text("break at=3\n")
                replaced.rename(faults)
                time.sleep(0.2)
            recovery = clients.wait_for(first_failure(clients, moment))
    row: Row = {
        "culprit": culprit, "seconds_to_200": recovery, "statuses": clients.after(moment),
        "pings": {str(status): count for status, count in sorted(Counter(clients.pings).items())},
    }  # fmt: skip
    if row["statuses"].keys() == {"200"}:
        row["failed"] = "nothing broke"
    elif recovery is None or "unanswered" in row["statuses"]:
        row["failed"] = "expected an answer for everybody, and the server back"
    return row


def first_failure(clients: Clients, moment: float) -> float:
    """When the first request failed after ``moment``: a device may go on for a while. ``moment`` if none fails."""
    end = time.perf_counter() + 5
    while time.perf_counter() < end:
        failed = [ended for _, ended, status in list(clients.answers) if status != 200 and ended > moment]
        if failed:
            return min(failed)
        time.sleep(0.01)
    return moment


def killed_worker(folder: Path, device: torch.device) -> Row:
    """A worker process that has a context of the device is killed while it works."""
    archive = archives.own_handler(folder)
    with pyserve(folder / "server", [archive]) as server:
        started(server, "own", b"1")
        clients = Clients(server, "/predictions/own", b"1")
        with clients.asking(4):
            time.sleep(0.3)
            moment = time.perf_counter()
            [worker] = server.describe("own")["workers"]
            os.kill(int(worker["pid"]), signal.SIGKILL)
            recovery = clients.wait_for(moment)
    row: Row = {"seconds_to_200": recovery, "statuses": clients.after(moment), "device": device.type}
    if recovery is None or "unanswered" in row["statuses"]:
        row["failed"] = "expected an answer for everybody, and another worker"
    return row
