"""What a model held is given back when it is unregistered, however often that happens."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import psutil
import pytest

from tests.support.handler_archives import ECHO, write_handler
from tests.support.networks import Affine
from tests.support.serving import Server
from tests.support.serving_models import write_pictures, write_torchscript

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = pytest.mark.server

ROUNDS = 10
PICTURES_HELD = 10 << 20
"""At least, by one model of pictures: its buffers."""

ENDLESS = """
import time

class Endless:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        while True:
            try:
                time.sleep(1)
            except BaseException:  # also what asks it to end
                pass
"""


def descriptors(process: psutil.Process) -> int:
    """All but those of connections, which come and go."""
    links = []
    for each in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(each))
    return sum(not link.startswith("socket") for link in links)


def register_again(server: Server, model: str) -> None:
    server.manage("DELETE", f"/models/{model}")
    server.manage("POST", f"/models?url={model}.mar&initial_workers=1&synchronous=true")


def test_descriptors_and_memory_of_unregistered_models_are_given_back(server: Server) -> None:
    write_handler(server.store, "echo", ECHO)
    write_pictures(server.store)
    server.start("--models", "echo.mar", "pictures.mar")
    for model in ("echo", "pictures"):  # what is made once is there
        register_again(server, model)
    before, resident = descriptors(server.process), server.process.memory_info().rss
    for _ in range(ROUNDS):
        register_again(server, "echo")
        register_again(server, "pictures")
    server.wait_for(lambda: descriptors(server.process) <= before, f"the {before} descriptors of before")
    server.wait_for(lambda: server.process.memory_info().rss - resident < ROUNDS * PICTURES_HELD / 2,
                    f"memory near the {resident} bytes of before")  # fmt: skip


def test_a_call_that_does_not_end_holds_up_the_end_of_its_model_for_no_longer_than_its_limit(server: Server) -> None:
    write_handler(server.store, "endless", ENDLESS)
    server.start()
    server.manage("POST", "/models?url=endless.mar&initial_workers=1&synchronous=true&response_timeout=2")
    worker = psutil.Process(int(server.describe("endless")["workers"][0]["pid"]))
    with server.connect() as connection:
        connection.sendall(b"POST /predictions/endless HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx")
        server.wait_for(lambda: server.metric("pyserve_batches_running", model="endless") == 1, "a call that runs")
    # Its answer comes when the worker is gone; before, only unregister_model_timeout would have ended the wait.
    server.manage("DELETE", "/models/endless")
    assert not worker.is_running()


def test_what_is_made_for_a_backend_ends_with_its_model(server: Server, tmp_path: Path) -> None:
    note, compiler = tmp_path / "pid", tmp_path / "endless-compiler"
    compiler.write_text(f"#!/bin/sh\necho $$ > {note}.partial; mv {note}.partial {note}; exec sleep 1000000\n")
    compiler.chmod(0o755)
    server.environment["CXX"] = str(compiler)
    config = {"input": {"dtype": "float32", "shape": [16]}, "backend": "aotinductor", "startupTimeout": 1_000_000}
    write_torchscript(server.store, Affine(), "named", config=config)
    server.start()
    registering = threading.Thread(
        target=server.ask, args=("POST", "/models?url=named.mar&initial_workers=1&synchronous=true"),
        kwargs={"port": "management"},
    )  # fmt: skip
    registering.start()
    server.wait_for(note.exists, "a compiler that runs")
    compiling = psutil.Process(int(note.read_text()))
    server.manage("DELETE", "/models/named")  # which waits for the load, and that for what is being made
    assert not compiling.is_running() or compiling.status() == psutil.STATUS_ZOMBIE  # nobody may have reaped it
    registering.join()
