"""What a handler's process has of Python, torch and the system is what a plain process has, or TorchServe's worker."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.cpu_budget import cpu_budget
from tests.support.handler_archives import write_handler
from tests.support.serving import Server

# Printed by a plain Python that has imported torch, and answered by a handler.
STATE = """
import gc, json, locale, multiprocessing, resource, signal, sys, warnings
import numpy, torch
from PIL import Image, ImageFile
from torch.utils.serialization import config

def state():
    return json.loads(json.dumps({
        "grad": torch.is_grad_enabled(), "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": str(torch.get_default_dtype()), "default device": str(torch.get_default_device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(), "mkldnn": torch.backends.mkldnn.enabled,
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "modes": [torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()],
        "jit": [torch._C._get_graph_executor_optimize(), torch._C._jit_set_profiling_mode(True)],
        "mmap": [config.load.mmap, int(config.load.mmap_flags)],
        "init": [f"{f.__module__}.{f.__qualname__}" for f in (torch.load, torch.Tensor.uniform_.__class__,
                 torch.nn.init.kaiming_uniform_, torch.nn.Linear.reset_parameters, torch.jit.load)],
        "warnings": [str(each) for each in warnings.filters],
        "locale": locale.setlocale(locale.LC_ALL), "start method": multiprocessing.get_start_method(allow_none=True),
        "SIGINT": str(signal.getsignal(signal.SIGINT)), "SIGTERM": str(signal.getsignal(signal.SIGTERM)),
        "SIGALRM": str(signal.getsignal(signal.SIGALRM)), "SIGCHLD": str(signal.getsignal(signal.SIGCHLD)),
        "gc": [gc.isenabled(), gc.get_threshold()], "recursion": sys.getrecursionlimit(),
        "core files": resource.getrlimit(resource.RLIMIT_CORE)[1],
        "numpy errors": numpy.geterr(), "pixels": Image.MAX_IMAGE_PIXELS, "truncated": ImageFile.LOAD_TRUNCATED_IMAGES,
        "excepthook": str(sys.excepthook), "trace": [str(sys.gettrace()), str(sys.getprofile())],
    }, default=str))
"""
HANDLER = (
    STATE
    + """
import _thread, os, random, subprocess, time, weakref

class Handler:
    def initialize(self, context):
        self.alarms = []
        if context.model_name == "timer":
            signal.signal(signal.SIGALRM, lambda *_: self.alarms.append(1))
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        self.model = torch.nn.Module()
        self.model.__dict__["itself"] = self.model

    def handle(self, data, context):
        what = data[0].get("body").decode()
        if what == "interrupt":
            try:
                _thread.interrupt_main()
                time.sleep(10)
            except KeyboardInterrupt:
                return ["interrupted"]
        if what == "alarm":
            seen = len(self.alarms)
            end = time.monotonic() + 20
            while len(self.alarms) == seen and time.monotonic() < end:
                time.sleep(0.001)
            return [len(self.alarms) > seen]
        if what == "forget":
            gone = weakref.ref(self.model)
            self.model = None
            gc.collect()
            return [gone() is None]
        if what == "child":
            return [subprocess.check_output([sys.executable, "-c", "import neighbour; print(neighbour.NAME)"], cwd="/")]
        if what == "random":
            return [[random.random(), numpy.random.rand(), torch.rand(1).item()]]
        if what.startswith("threads"):
            if what[7:]:
                torch.set_num_threads(int(what[7:]))
            return [torch.get_num_threads()]
        if what == "environment":
            return [dict(os.environ)]
        return [state()]
"""
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("surroundings"))
    made.environment |= {"TS_IPEX_ENABLE": "yes"}
    made.environment.pop("TS_DECODE_INPUT_REQUEST", None)
    write_handler(made.store, "m", HANDLER, files={"neighbour.py": "NAME = 'beside it'\n"})
    made.start("--models", "m.mar")
    try:
        yield made
    finally:
        made.kill()


def told(server: Server, what: str) -> Any:
    answer = server.ask("POST", "/predictions/m", what.encode())
    assert answer.status == 200, answer.body
    return json.loads(answer.body) if answer.body[:1] in b"[{tf0123456789" else answer.body.decode()


def test_nothing_is_set_in_python_torch_or_pillow(server: Server) -> None:
    plain = subprocess.run(
        [sys.executable, "-c", f"{STATE}\nprint(json.dumps(state()))"],
        capture_output=True, text=True, check=True, cwd="/", env=server.environment,
    )  # fmt: skip
    assert told(server, "state") == json.loads(plain.stdout)


def test_what_libraries_rely_on_works(server: Server) -> None:
    assert told(server, "interrupt") == "interrupted"
    assert told(server, "child").strip() == "beside it"


def test_a_timer_that_initialize_has_set_runs_on(tmp_path: Path, server: Server) -> None:
    write_handler(server.store, "timer", HANDLER, files={"neighbour.py": ""})
    server.manage("POST", "/models?url=timer.mar&initial_workers=1&synchronous=true")
    answer = server.ask("POST", "/predictions/timer", b"alarm")
    assert (answer.status, answer.body) == (200, b"true")


def test_a_model_that_a_handler_replaces_is_freed(server: Server) -> None:
    assert told(server, "forget") is True


def test_torchs_threads_are_the_workers_share_or_the_handlers_own(server: Server) -> None:
    write_handler(server.store, "threads", HANDLER, files={"neighbour.py": ""})
    server.manage("POST", "/models?url=threads.mar&initial_workers=1&synchronous=true")
    ask = lambda body: server.ask("POST", "/predictions/threads", body).json  # noqa: E731
    models = [each["modelName"] for each in server.manage("GET", "/models")["models"]]
    workers = sum(len(server.describe(name)["workers"]) for name in models)
    assert ask(b"threads") == max(1, cpu_budget() // workers)
    assert ask(b"threads3") == 3
    server.manage("PUT", "/models/threads?batch_size=2")
    assert ask(b"threads") == 3
    server.manage("DELETE", "/models/threads")


def test_workers_draw_other_random_numbers(server: Server) -> None:
    server.manage("PUT", "/models/m?min_worker=2&max_worker=2&synchronous=true")
    one = told(server, "random")
    server.manage("PUT", "/models/m?min_worker=0&max_worker=0&synchronous=true")
    server.manage("PUT", "/models/m?min_worker=1&max_worker=1&synchronous=true")
    other = told(server, "random")
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_environment_is_torchserves(server: Server) -> None:
    environment = told(server, "environment")
    wanted = {"TS_DECODE_INPUT_REQUEST": "true", "TS_IPEX_ENABLE": "false", "TS_IPEX_GPU_ENABLE": "false"}
    assert {name: environment.get(name) for name in wanted} == wanted
    first, *others = environment["PYTHONPATH"].split(os.pathsep)
    assert Path(first).parent == server.folder / "cache" / "models"
    assert others == server.environment["PYTHONPATH"].split(os.pathsep)


def test_core_files_can_be_asked_for(server: Server) -> None:
    assert told(server, "state")["core files"] == resource.getrlimit(resource.RLIMIT_CORE)[1]
