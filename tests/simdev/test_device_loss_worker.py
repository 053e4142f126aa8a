"""A worker process whose device is lost: who is answered what, and that another worker comes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.simdev.serving import give_device
from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, Answer, Server, at_once

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = [pytest.mark.server, pytest.mark.accelerator]

# A negative number breaks the device for the process that it comes to.
HANDLER = """
import os

import torch


class Handler:
    def initialize(self, context):
        self.notes = context.model_yaml_config["notes"]

    def handle(self, data, context):
        numbers = [row["body"] for row in data]
        with open(self.notes, "a") as file:
            file.write("".join(f"{number}\\n" for number in numbers))
        x = torch.tensor(numbers, dtype=torch.float32).to("simdev:0")
        if min(numbers) < 0:
            import simdev

            simdev.fault(f"strict_free on=1 pid={os.getpid()}")
            simdev.fault(f"break at=0 device=0 pid={os.getpid()}")
        return (x * 2).cpu().tolist()
"""


def start(server: Server, **config: int) -> Path:
    """Returns the file in which each call of the handler notes its numbers."""
    notes = server.folder / "notes"
    give_device(server)
    write_handler(server.store, "twice", HANDLER, config={"notes": str(notes), "maxBatchDelay": 10_000, **config})
    server.start("--models", "twice.mar")
    return notes


def ask(server: Server, number: int) -> Answer:
    return server.ask("POST", "/predictions/twice", json.dumps(number).encode(), JSON)


def check_failed(answer: Answer) -> None:
    assert answer.status == 503 and answer.detail["exception"] == "AcceleratorError"
    assert "device-side assert" in answer.detail["text"]


def test_one_that_breaks_the_device_is_told_so_and_the_others_of_its_batch_are_answered(server: Server) -> None:
    notes = start(server, batchSize=4, minBatch=4, minWorkers=1, maxWorkers=1)
    numbers = [1, 2, -3, 4]
    answers = at_once([lambda number=number: ask(server, number) for number in numbers])  # type: ignore[misc]
    for number, answer in zip(numbers, answers, strict=True):
        if number < 0:
            check_failed(answer)
        else:
            assert answer.status == 200 and answer.json == 2.0 * number
    ran = Counter(int(line) for line in notes.read_text().split())
    assert ran[-3] == 2 and max(ran.values()) <= 2, "once with the others, once alone"


def test_workers_that_lost_their_device_do_not_count_as_a_crash_loop(server: Server) -> None:
    start(server, batchSize=1, minWorkers=1, maxWorkers=1)
    for _ in range(6):
        check_failed(ask(server, -1))
        server.wait_for(lambda: ask(server, 5).status == 200, "another worker")
    described = server.describe("twice")
    assert described["state"] == "READY" and len(described["workers"]) == 1
    server.wait_for_log("the device is lost for this worker", 6)
    assert server.log().count("the device is lost for this worker") == 6


ASYNC_HANDLER = HANDLER.replace("    def handle(", "    async def handle(")


def test_so_it_is_with_handlers_whose_calls_overlap(server: Server) -> None:
    give_device(server)
    config = {"notes": str(server.folder / "notes"), "minWorkers": 1, "maxWorkers": 1, "asyncCommunication": True}
    write_handler(server.store, "twice", ASYNC_HANDLER, config=config)
    server.start("--models", "twice.mar")
    assert ask(server, 4).json == 8.0
    check_failed(ask(server, -1))
    server.wait_for(lambda: ask(server, 5).status == 200, "another worker")
    server.wait_for_log("the device is lost for this worker")
    assert server.log().count("the device is lost for this worker") == 1
