"""Four more servers for `bench/compare.py --all`. Their settings stand in `peers`; here is what each is sent."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.servers import free_ports
from bench.sides import PEERS, Side, running, settings_for, when_ready
from bench.workloads import JSON_TYPE, RAW_TYPE, UPLOAD_TYPE, Workload, binary_requests
from pyserve.api.open_inference_rest import JSON_SIZE_HEADER

# (folder, bin of the peer's environment, workload, workers, cores)
MakeSide = Callable[[Path, Path, Workload, int, int], Side]


@dataclass
class App:
    """A peer whose file in `peers` starts it, on the port that the environment names."""

    name: str
    path: str
    body: bytes
    content_type: str
    headers: dict[str, str] = field(default_factory=dict)

    def starter(
        self, folder: Path, bin_folder: Path, load: Workload, workers: int, cores: int
    ) -> Callable[[], AbstractContextManager[str]]:
        """`Side.start`."""

        @contextmanager
        def start() -> Iterator[str]:
            port, grpc_port = free_ports(2)
            variables = {
                **settings_for(load, workers, cores), "WORK_PORT": str(port), "WORK_GRPC_PORT": str(grpc_port)
            }  # fmt: skip
            command = [str(bin_folder / "python"), str(PEERS / f"{self.name}_app.py")]
            url = f"http://127.0.0.1:{port}{self.path}"
            with running(command, variables, folder / f"{self.name}.log") as check:
                yield when_ready(url, self.body, self.content_type, check, self.headers)

        return start


def pytriton_side(folder: Path, bin_folder: Path, load: Workload, workers: int, cores: int) -> Side:
    bodies, head_size = binary_requests(load, "FP32" if load.kind == "floats" else "BYTES")
    app = App("pytriton", "/v2/models/work/infer", bodies[0], RAW_TYPE, {JSON_SIZE_HEADER: str(head_size)})
    flags = ("--header", f"{JSON_SIZE_HEADER}: {head_size}")
    return Side("PyTriton", workers, app.starter(folder, bin_folder, load, workers, cores), RAW_TYPE, bodies, flags)


def ray_side(folder: Path, bin_folder: Path, load: Workload, workers: int, cores: int) -> Side:
    app = App("ray", "/", load.bodies[0], RAW_TYPE)
    return Side("Ray Serve", workers, app.starter(folder, bin_folder, load, workers, cores), RAW_TYPE, load.bodies)


def bentoml_side(folder: Path, bin_folder: Path, load: Workload, workers: int, cores: int) -> Side:
    if load.kind == "picture":
        content_type, bodies = UPLOAD_TYPE, load.upload_bodies("inputs")
    else:
        content_type, bodies = JSON_TYPE, [json.dumps({"inputs": [each]}).encode() for each in load.numbers()]
    app = App("bentoml", "/predict", bodies[0], content_type)
    return Side("BentoML", workers, app.starter(folder, bin_folder, load, workers, cores), content_type, bodies)


def mlserver_side(folder: Path, bin_folder: Path, load: Workload, workers: int, cores: int) -> Side:
    inputs: list[dict[str, object]]
    if load.kind == "floats":
        inputs = [{"datatype": "FP32", "shape": [1, len(each)], "data": each} for each in load.numbers()]
    else:
        inputs = [
            {"datatype": "BYTES", "shape": [1, 1], "parameters": {"content_type": "base64"},
             "data": [base64.b64encode(body).decode()]}
            for body in load.bodies
        ]  # fmt: skip
    bodies = [json.dumps({"inputs": [{"name": "input0", **each}]}).encode() for each in inputs]
    app = App("mlserver", "/v2/models/work/infer", bodies[0], JSON_TYPE)
    return Side("MLServer", workers, app.starter(folder, bin_folder, load, workers, cores), JSON_TYPE, bodies)


MORE_SIDES: dict[str, MakeSide] = {
    "pytriton": pytriton_side, "ray": ray_side, "bentoml": bentoml_side, "mlserver": mlserver_side,
}  # fmt: skip
