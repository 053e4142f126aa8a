"""The servers of the comparison, each at its best documented configuration. Their own code is in `peers`.

Every side serves the same TorchScript file with the same preprocessing, batching on, and ``workers`` workers that
share the cores: intra-op threads = cores / workers, for all sides alike.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench.servers import Server, free_ports, pyserve, torchserve
from bench.workloads import JSON_TYPE, RAW_TYPE, UPLOAD_TYPE, Workload, binary_requests
from pyserve.api.open_inference_rest import JSON_SIZE_HEADER

PEERS = Path(__file__).parent / "peers"
DELAY_MS = 5  # how long a peer may wait for a batch to fill; pyserve waits only while its workers are busy
QUEUE_SIZE = 2048
STOP_S = 30.0
READY_S = 120.0
LOG_SHOWN = 2000  # characters

# What goes into each peer's virtual environment, beside torch, numpy and pillow.
PACKAGES = {
    "torchserve": ["torchserve==0.12.0", "torch-model-archiver==0.12.0", "setuptools<81", "captum", "psutil", "pyyaml"],
    "litserve": ["litserve", "python-multipart"],
    "mosec": ["mosec"],
    "pytriton": ["nvidia-pytriton"],
    "ray": ["ray[serve]"],  # with its own HAProxy
    "bentoml": ["bentoml==1.4.39", "uvloop", "httptools"],  # the latter two are taken if they are there
    "mlserver": ["mlserver", "uvloop<0.22"],  # its worker processes do not start with a later uvloop
}


@dataclass
class Side:
    """One server in one configuration.

    Attributes:
        start: a context that gives the address to post to; the server answers when it is entered.
        content_type: of the requests; "" for none.
        bodies: what is posted, in turn.
        flags: further ones of bench/latency.py: ``--header`` and its value, any number of times.
        chosen: the backend that pyserve runs the model on; known once the server answers.
    """

    name: str
    workers: int
    start: Callable[[], AbstractContextManager[str]]
    content_type: str
    bodies: list[bytes]
    flags: tuple[str, ...] = ()
    chosen: str = ""

    @property
    def label(self) -> str:
        return self.label_of("")

    def label_of(self, variant: str) -> str:
        """Of a ``variant`` of its requests, see `bench.workloads`."""
        name = f"{self.name}, {variant}" if variant else self.name
        return f"{name}, {self.workers} worker{'s' if self.workers > 1 else ''}" if self.workers else name


def environment_of(root: Path, name: str, torch_requirement: str) -> Path:
    """``bin`` of the peer's virtual environment, made if it is not there."""
    folder = root / name
    done = folder / ".made"
    if not done.exists():
        print(f"installing {name} into {folder}", file=sys.stderr)
        subprocess.run([_python_for(name), "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "pip"), "install", "--quiet"]
        subprocess.run([*pip, torch_requirement], check=True)
        subprocess.run([*pip, "numpy", "pillow", *PACKAGES[name]], check=True)
        done.touch()
    return folder / "bin"


def _python_for(name: str) -> str:
    """The interpreter a peer runs on: this one, except that PyTriton's libpython of 3.11 is one from before 3.11.6.

    With a later standard library it fails with "'_thread.RLock' object has no attribute '_recursion_count'"
    (github.com/triton-inference-server/pytriton/issues/51).
    """
    if name != "pytriton" or not (3, 11, 6) <= sys.version_info < (3, 12):
        return sys.executable
    question = "import sys; sys.exit(sys.version_info >= (3, 11, 6))"
    for folder in [*os.environ["PATH"].split(os.pathsep), "/usr/bin"]:
        path = Path(folder) / "python3.11"
        if path.exists() and subprocess.run([str(path), "-c", question], check=False).returncode == 0:
            return str(path)
    raise RuntimeError("PyTriton needs a python3.11 from before 3.11.6 on the PATH, and there is none")


def versions_of(bin_folder: Path, name: str) -> dict[str, str]:
    """Of the packages in a peer's environment that matter."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "there = {each.metadata['Name'].lower() for each in m.distributions()}\n"
        "print(json.dumps({each: m.version(each) for each in sys.argv[1:] if each in there}))"
    )
    names = [re.split(r"[\[<=]", each)[0] for each in PACKAGES[name]]
    wanted = [*names, "torch", "uvicorn", "fastapi"]
    command = [str(bin_folder / "python"), "-c", code, *wanted]
    found: dict[str, str] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def pyserve_side(folder: Path, load: Workload, archive: str, workers: int, *, wants_json: bool = False) -> Side:
    """Ours; `archive` is a key of the workload's archives."""
    path = load.archives[archive]
    model = path.stem

    @contextmanager
    def start() -> Iterator[str]:
        config = folder / "config.properties"
        config.write_text(f"job_queue_size={QUEUE_SIZE}\n")
        with pyserve(folder / "pyserve", [path], "--ts-config", str(config), cache=folder.parent / "cache") as server:
            server.first_answer_s(model, load.bodies[0])
            side.chosen = server.chosen_backend(model)
            server.set(model, f"min_worker={workers}&max_worker={workers}")
            yield server.url(f"/predictions/{model}")

    name = "pyserve" if archive == "fp32" else f"pyserve, {archive}"
    if wants_json:
        bodies = [body[len(b'{"input": ') : -1] for body in load.json_bodies()]
        side = Side(f"{name}, JSON", workers, start, JSON_TYPE, bodies)
    else:
        side = Side(name, workers, start, RAW_TYPE if load.kind != "picture" else "", load.bodies)
    return side


def binary_side(folder: Path, load: Workload) -> Side:
    """Ours, by the Open Inference Protocol's binary extension."""
    plain = pyserve_side(folder, load, "fp32", 1)
    bodies, head_size = binary_requests(load, "FP32")

    @contextmanager
    def start() -> Iterator[str]:
        with plain.start() as url:
            yield url.replace("/predictions/", "/v2/models/") + "/infer"

    flags = ("--header", f"{JSON_SIZE_HEADER}: {head_size}")
    return Side("pyserve, v2 binary", 1, start, RAW_TYPE, bodies, flags)


def torchserve_side(
    folder: Path, bin_folder: Path, load: Workload, workers: int, cores: int, *, batch_size: int = 0
) -> Side:  # fmt: skip
    @contextmanager
    def start() -> Iterator[str]:
        archive = torchserve_archive_for(folder, bin_folder, load, workers, batch_size or load.batch_size)
        variables = settings_for(load, workers, cores)
        with with_environment(variables), torchserve(folder / "torchserve", bin_folder, archive) as server:
            server.first_answer_s(load.name, load.bodies[0])
            yield server.url(f"/predictions/{load.name}")

    name = f"TorchServe, batch size {batch_size}" if batch_size else "TorchServe"
    return Side(name, workers, start, RAW_TYPE, load.bodies)


def torchserve_archive_side(folder: Path, bin_folder: Path, load: Workload, archive: str) -> Side:
    """TorchServe with the very archive that pyserve serves; `archive` is a key of the workload's archives."""
    path = load.archives[archive]

    @contextmanager
    def start() -> Iterator[str]:
        with torchserve(folder / "torchserve", bin_folder, path) as server:
            server.first_answer_s(path.stem, load.bodies[0])
            yield server.url(f"/predictions/{path.stem}")

    return Side(f"TorchServe, {archive}", 1, start, RAW_TYPE, load.bodies)


def litserve_side(folder: Path, bin_folder: Path, load: Workload, workers: int, cores: int) -> Side:
    is_upload = load.kind == "picture"
    bodies = load.upload_bodies() if is_upload else load.json_bodies()
    content_type = UPLOAD_TYPE if is_upload else JSON_TYPE

    @contextmanager
    def start() -> Iterator[str]:
        (port,) = free_ports(1)
        variables = {**settings_for(load, workers, cores), "WORK_PORT": str(port)}
        command = [str(bin_folder / "python"), str(PEERS / "litserve_app.py")]
        with running(command, variables, folder / "litserve.log") as check:
            yield when_ready(f"http://127.0.0.1:{port}/predict", bodies[0], content_type, check)

    return Side("LitServe", workers, start, content_type, bodies)


def mosec_side(folder: Path, bin_folder: Path, load: Workload, workers: int, cores: int) -> Side:
    @contextmanager
    def start() -> Iterator[str]:
        (port,) = free_ports(1)
        command = [str(bin_folder / "python"), str(PEERS / "mosec_app.py"), "--address", "127.0.0.1", "--port",
                   str(port), "--timeout", "120000", "--capacity", str(QUEUE_SIZE)]  # fmt: skip
        with running(command, settings_for(load, workers, cores), folder / "mosec.log") as check:
            yield when_ready(f"http://127.0.0.1:{port}/inference", load.bodies[0], RAW_TYPE, check)

    return Side("mosec", workers, start, RAW_TYPE, load.bodies)


def settings_for(load: Workload, workers: int, cores: int) -> dict[str, str]:
    """What `peers.work` reads from the environment."""
    threads = str(max(1, cores // workers))
    return {
        "WORK_KIND": load.kind, "WORK_MODEL": str(load.model), "WORK_WORKERS": str(workers), "WORK_THREADS": threads,
        "WORK_BATCH": str(load.batch_size), "WORK_DELAY_MS": str(DELAY_MS), "WORK_QUEUE": str(QUEUE_SIZE),
        "OMP_NUM_THREADS": threads,  # for servers that run the model in another thread than they load it in
    }  # fmt: skip


def torchserve_archive_for(folder: Path, bin_folder: Path, load: Workload, workers: int, batch_size: int) -> Path:
    """The workload as an archive for TorchServe."""
    config = folder / "torchserve.yaml"
    config.write_text(
        f"minWorkers: {workers}\nmaxWorkers: {workers}\nbatchSize: {batch_size}\nmaxBatchDelay: {DELAY_MS}\n"
        f"jobQueueSize: {QUEUE_SIZE}\n"
    )
    store = folder / "torchserve-store"
    store.mkdir(exist_ok=True)
    subprocess.run(
        [str(bin_folder / "torch-model-archiver"), "--model-name", load.name, "--version", "1.0", "--force",
         "--handler", str(PEERS / "torchserve_handler.py"), "--extra-files", str(PEERS / "work.py"),
         "--config-file", str(config), "--export-path", str(store)],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return store / f"{load.name}.mar"


@contextmanager
def with_environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets them in this process's environment, whose children inherit it."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def running(command: list[str], variables: dict[str, str], log_path: Path) -> Iterator[Callable[[], None]]:
    """A server with children of its own, all of which are gone afterwards.

    Gives a function that raises RuntimeError with the end of its log if the server is not running any more.
    """
    environment = {**os.environ, **variables, "PYTHONPATH": str(PEERS)}
    with open(log_path, "ab") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, cwd=log_path.parent, start_new_session=True
        )

    def check() -> None:
        if process.poll() is not None:
            end = log_path.read_text(errors="replace")[-LOG_SHOWN:]
            raise RuntimeError(f"{log_path.stem} ended with {process.returncode} before it answered; its log:\n{end}")

    try:
        yield check
    finally:
        process.terminate()  # which then ends its own; Ray cannot stop without them
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(process.pid, signal.SIGKILL)  # whoever did not hear
        except ProcessLookupError:
            pass
        process.wait()


def when_ready(
    url: str, body: bytes, content_type: str, check: Callable[[], None], headers: dict[str, str] | None = None
) -> str:
    """``url`` once it has answered a request with 200; ``check`` raises if there is no use in waiting any longer."""
    parts = urlsplit(url)
    path, port = parts.path, parts.port or 80
    server = Server(port, 0, time.perf_counter())
    status = 0
    deadline = time.perf_counter() + READY_S
    while time.perf_counter() < deadline:
        status, _ = server.ask("POST", port, path, body, {"Content-Type": content_type, **(headers or {})})
        if status == 200:
            return url
        check()
        time.sleep(0.05)
    raise RuntimeError(f"no 200 from {url} within {READY_S:g} s; the last answer was {status}")
