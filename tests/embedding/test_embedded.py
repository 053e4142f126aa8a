"""An engine in the caller's process: what it answers, what it leaves as it was, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import uvloop

import pyserve
from pyserve.embedding.engine import EmbeddedServer
from pyserve.embedding.settings import engine_config
from pyserve.errors import ConfigError
from tests.support.asgi_site import LoopThread, own_environment
from tests.support.handler_archives import write_handler
from tests.support.serving import LIMIT_S
from tests.support.serving_models import Linear, write_linear

ROOT = Path(__file__).resolve().parents[2]
TORCH_THREADS = torch.get_num_threads()  # a thread takes the process's number over when it first asks

# Answers with its process; holds while a file is there.
HANDLER = """
import os
import time

def handle(data, context):
    if data is None:
        return None
    body = data[0].get("body")
    if isinstance(body, dict) and "hold" in body:
        open(body["hold"] + ".begun", "w").close()
        while os.path.exists(body["hold"]):
            time.sleep(0.01)
    if body == "fail":
        raise ValueError("told to")
    return [{"pid": os.getpid(), "body": str(body)} for _ in data]
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    write_linear(store)
    write_linear(store, version="2.0", seed=2, file="linear-2")
    write_handler(store, "own", HANDLER)
    return store


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with own_environment(), LoopThread() as thread:
        yield thread


@pytest.fixture(scope="module")
def engine(thread: LoopThread, store: Path) -> Iterator[EmbeddedServer]:
    engine = pyserve.embedded([store / "linear.mar", store / "own.mar"], config={"max_request_size": 100_000})
    thread.run(engine.start())
    yield engine
    thread.run(engine.stop())


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def expected(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = Linear(seed)(x)
    return found


def test_what_is_sent_comes_back_as_its_kind(thread: LoopThread, engine: EmbeddedServer) -> None:
    x = torch.rand(3, 4)
    in_torch = thread.run(engine.predict("linear", x))
    in_numpy = thread.run(engine.predict("linear", x.numpy()))
    assert torch.allclose(in_torch, expected(x)) and isinstance(in_numpy, np.ndarray)
    assert np.allclose(in_numpy, expected(x).numpy())
    assert np.allclose(thread.run(engine.predict("linear", x[0].tolist())), expected(x[:1]).numpy()[0])
    assert thread.run(engine.predict("own", b"raw"))["body"] == "bytearray(b'raw')"


class Minus(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a - b


class Swapped(torch.nn.Module):
    def forward(self, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return 2 * (b - a)


def test_arrays_have_the_order_of_the_model_that_answers(thread: LoopThread) -> None:
    """Also of one that came by the management API."""
    x, y = torch.full((1, 4), 3.0), torch.ones(1, 4)

    async def run() -> None:
        async with pyserve.embedded([pyserve.Model(Minus(), name="pair", example=(x, y))]) as engine:
            assert torch.equal(await engine.predict("pair", (x, y)), x - y)
            await engine.running.calls.ask("DELETE", "/models/pair", b"", {})
            await engine.register(pyserve.Model(Swapped(), name="pair", example=(x, y)))
            assert torch.equal(await engine.predict("pair", (x, y)), 2 * (x - y))

    thread.run(run())


def test_errors_are_the_clients(thread: LoopThread, engine: EmbeddedServer) -> None:
    with pytest.raises(pyserve.AnswerError, match="Model not found: none") as missing:
        thread.run(engine.predict("none", b"x"))
    assert missing.value.status == 404
    with pytest.raises(pyserve.AnswerError, match="told to") as failed:  # this process may read all of it
        thread.run(engine.predict("own", "fail"))
    assert failed.value.status == 503 and "exception" in failed.value.detail
    with pytest.raises(pyserve.AnswerError, match="max_request_size is 100000 bytes") as large:
        thread.run(engine.predict("own", bytes(100_001)))
    assert large.value.status == 413
    assert not engine.running.server.bodies.size


def test_handlers_run_in_processes_of_their_own(thread: LoopThread, engine: EmbeddedServer) -> None:
    pid = thread.run(engine.predict("own", {"a": 1}))["pid"]
    assert pid in {child.pid for child in psutil.Process().children(recursive=True)}


def test_its_load_is_known_before_anybody_asks_for_metrics(thread: LoopThread, engine: EmbeddedServer) -> None:
    async def look() -> tuple[float, float]:
        return engine.running.loads()

    busy, wait_s = thread.run(look())
    assert 0 <= busy <= 1 and wait_s >= 0


def test_management_is_the_clients(thread: LoopThread, engine: EmbeddedServer, store: Path) -> None:
    name, version = thread.run(engine.register(store / "own.mar", name="second", workers=0))
    assert (name, version) == ("second", "1.0")
    thread.run(engine.scale("second", 1))
    assert thread.run(engine.versions("second"))[0]["minWorkers"] == 1
    assert thread.run(engine.deploy(store / "linear-2.mar")) == "2.0"
    assert [each["modelVersion"] for each in thread.run(engine.versions("linear"))] == ["2.0"]
    x = torch.rand(1, 4)
    assert torch.allclose(thread.run(engine.predict("linear", x)), expected(x, 2))
    thread.run(engine.deploy(store / "linear.mar"))
    thread.run(engine.unregister("second"))
    assert set(thread.run(engine.models())) == {"linear", "own"}
    with pytest.raises(pyserve.AnswerError) as twice:
        thread.run(engine.register(store / "own.mar"))
    assert twice.value.status == 409
    with pytest.raises(pyserve.ServingError, match=r"nothing\.mar"):
        thread.run(engine.register(store / "nothing.mar"))
    with pytest.raises(TypeError, match="batchsize"):
        thread.run(engine.register(store / "own.mar", name="third", batchsize=3))


def test_whoever_is_cancelled_cancels_the_request(thread: LoopThread, engine: EmbeddedServer, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()

    async def cancel_one() -> None:
        first = asyncio.ensure_future(engine.predict("own", {"hold": str(hold)}))
        await asyncio.to_thread(wait_for, Path(f"{hold}.begun"))
        second = asyncio.ensure_future(engine.predict("own", {"hold": f"{tmp_path}/second"}))  # waits behind it
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        hold.unlink()
        await first
        await engine.predict("own", b"behind both")

    thread.run(cancel_one())
    assert not (tmp_path / "second.begun").exists(), "it was run all the same"
    assert not engine.running.server.bodies.size


def test_it_is_called_from_other_loops_too(thread: LoopThread, engine: EmbeddedServer) -> None:
    async def ask() -> list[Any]:
        found: list[Any] = await asyncio.gather(*(engine.predict("own", {"n": n}) for n in range(5)))
        return found

    assert [each["body"] for each in asyncio.run(ask())] == [str({"n": n}) for n in range(5)]


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_two_at_once_and_one_after_the_other(store: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def both() -> None:
        for _ in range(2):
            async with (
                pyserve.embedded(str(store / "linear.mar")) as one,
                pyserve.embedded(f"two={store / 'own.mar'}") as two,
            ):
                assert set(await one.models()) == {"linear"} and set(await two.models()) == {"two"}
                assert await one.predict("linear", torch.zeros(1, 4)) is not None
                assert (await two.predict("two", b"x"))["pid"] != os.getpid()
                assert await one.is_ready() and await two.is_ready()
            assert not await one.is_ready()
            with pytest.raises(pyserve.ServingError, match="does not run"):
                await one.predict("linear", b"x")

    with own_environment(), LoopThread(new_loop) as thread:
        thread.run(both())


def state_of_process() -> dict[str, Any]:
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "switch": sys.getswitchinterval(),
        "torch": (torch.get_num_threads(), TORCH_THREADS),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "hooks": (sys.excepthook, threading.excepthook),
        "folder": os.getcwd(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "stdio": (sys.stdout, sys.stderr),
    }


def zygotes() -> set[int]:
    """Pids of our processes that workers are forked from, and of others that the engine starts."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "pyserve." in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


def test_of_the_process_nothing_is_changed(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    variables = dict(os.environ)
    threads, children = set(threading.enumerate()), zygotes()

    async def use() -> None:
        before = state_of_process()
        async with pyserve.embedded([store / "linear.mar", store / "own.mar"]) as engine:
            await engine.predict("own", b"x")
            await engine.predict("linear", torch.zeros(1, 4))
            assert state_of_process() == before
            assert zygotes() - children
        assert state_of_process() == before

    with own_environment():
        asyncio.run(use())
        changed = {name for name in os.environ if os.environ[name] != variables.get(name)}
    assert changed <= {"PYSERVE_GIVEN", "PYSERVE_WEIGHTS_CACHE"}  # as docs/embedding.md says
    assert not list(tmp_path.iterdir()), "it has written into the current folder"
    assert _ended(threads)
    assert zygotes() <= children


def _ended(before: set[threading.Thread]) -> bool:
    """Whether the pool's threads that have come since then end."""
    pool = [each for each in threading.enumerate() if each not in before and each.name == "preprocess"]
    for each in pool:
        each.join(LIMIT_S)
    return not any(each.is_alive() for each in pool)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["nothing.mar"], r"Model not found at: .*nothing\.mar"),
        (["broken.mar"], "broken"),
        ([torch.nn.Linear(2, 2)], "a module needs example="),
        ([3], "int is neither a torch.nn.Module nor the path of a model"),
    ],
)
def test_a_start_that_fails_leaves_nothing(store: Path, tmp_path: Path, models: list[Any], message: str) -> None:
    (tmp_path / "broken.mar").write_bytes(b"no archive")
    models = [tmp_path / each if isinstance(each, str) else each for each in models]
    threads, children = set(threading.enumerate()), zygotes()

    async def start() -> None:
        engine = pyserve.embedded([store / "own.mar", *models])
        with pytest.raises(pyserve.ServingError, match=message):
            await engine.start()
        assert not engine.is_started
        await engine.stop()

    with own_environment():
        asyncio.run(start())
    assert _ended(threads)
    assert zygotes() <= children


def test_a_model_that_cannot_be_loaded_ends_the_start(tmp_path: Path) -> None:
    write_handler(tmp_path, "bad", "raise RuntimeError('not today')\n")
    children = zygotes()

    async def start() -> None:
        with pytest.raises(pyserve.ServingError, match="not today"):
            await pyserve.embedded([tmp_path / "bad.mar"]).start()

    with own_environment():
        asyncio.run(start())
    assert zygotes() <= children


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"job_queue_sise": 1}, "unknown key 'job_queue_sise'; did you mean 'job_queue_size'"),
        ({"job_queue_size": 0}, r"config\['job_queue_size'\]: job_queue_size cannot be '0'; allowed"),
        ({"inference_address": "http://0.0.0.0"}, "inference_address is for a server process"),
        ({"front_ends": 2}, "front_ends is for a server process"),
        ({"models": {1, 2}}, "models cannot be a set"),
        ({"model_store": "/nowhere/at/all"}, "directory not found"),
    ],
)
def test_configurations_are_checked(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_config(config, None)


def test_what_is_given_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYSERVE_JOB_QUEUE_SIZE", "7")
    monkeypatch.setenv("PYSERVE_INFERENCE_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.properties").write_text("max_request_size=1\n")
    assert engine_config({}, None).job_queue_size == 7
    config = engine_config({"job_queue_size": 9, "isolate_errors": False, "models": {"m": {"1.0": {}}}}, None)
    assert (config.job_queue_size, config.isolate_errors, config.models) == (9, False, {"m": {"1.0": {}}})
    assert config.max_request_size > 1 and not config.inference_address.is_loopback
    assert engine_config({}, "config.properties").max_request_size == 1


PROGRAM = """
import asyncio, sys, pyserve
async def main():
    async with pyserve.embedded([sys.argv[1]]) as engine:
        print((await engine.predict("own", b"x"))["pid"], flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


def children_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_no_process_outlives_one_that_is_killed(store: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(store / "own.mar")], stdout=subprocess.PIPE, text=True,
        cwd=ROOT,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            worker = int(process.stdout.readline())
            children = children_of(process)
            assert worker in {each.pid for each in children} and len(children) >= 2
        finally:
            process.kill()
    _, alive = psutil.wait_procs(children, timeout=LIMIT_S)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


def test_no_process_outlives_a_thread_that_leaves_its_loop(store: Path) -> None:
    """The caller has forgotten to stop it; the thread that its loop ran in has ended."""
    found: list[int] = []

    async def start() -> None:
        engine = pyserve.embedded([store / "own.mar"])
        await engine.start()
        found.append((await engine.predict("own", b"x"))["pid"])

    def run() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(start())

    with own_environment():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(LIMIT_S)
    worker = psutil.Process(found[0]) if psutil.pid_exists(found[0]) else None
    if worker is not None:
        _, alive = psutil.wait_procs([worker], timeout=LIMIT_S)
        assert not alive


def test_importing_pyserve_imports_no_engine() -> None:
    code = "import sys, pyserve\nassert not [name for name in sys.modules if 'embedding' in name or name == 'torch']"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert pyserve.Model("a.mar").handler == "tensor"


def test_waiting_for_a_coroutine_of_it_is_what_the_types_say() -> None:
    call: Callable[..., Awaitable[Any]] = pyserve.EmbeddedServer().predict
    with pytest.raises(pyserve.ServingError, match="does not run"):
        asyncio.run(call("m", b"x"))  # type: ignore[arg-type]
