"""Servers with several accelerators: who runs where, what fits where, and what becomes of what cannot."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.simdev.serving import give_device
from tests.support import serving_models
from tests.support.handler_archives import write_handler
from tests.support.serving import Server

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = [pytest.mark.server, pytest.mark.accelerator]

NUMBERS = [0.5, -1.0, 2.0, 3.0]
ON_TWO = {"input": serving_models.LINEAR_INPUT, "minWorkers": 4, "maxWorkers": 4}
# Says which device it was given, and which one a handler written for TorchServe chooses.
WHERE = """
import torch

class Where:
    def initialize(self, context):
        gpu_id = context.system_properties.get("gpu_id")
        self.given = gpu_id
        cuda = torch.cuda.is_available() and gpu_id is not None
        self.chosen = torch.device("cuda:" + str(gpu_id) if cuda else "cpu")
        self.bad_fork = torch.cuda._is_in_bad_fork()
        print("was given GPU", gpu_id)

    def handle(self, data, context):
        total = torch.ones(2, device=self.chosen).sum().item()
        said = {"given": self.given, "chosen": str(self.chosen), "bad_fork": self.bad_fork, "total": total}
        return [said] * len(data)
"""
TEXT = """
import torch

class Text(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = torch.nn.Embedding(50, 8), torch.nn.Embedding(16, 8)

    def forward(self, ids):
        at = torch.arange(ids.size(1), device=ids.device)
        at = (lambda each: each + 0)(at)  # no script can have that: it is traced
        return (self.words(ids) + self.places(at)).sum(2)
"""


def linear(numbers: list[float], seed: int = 0) -> list[float]:
    with torch.no_grad():
        answer: list[float] = serving_models.Linear(seed)(torch.tensor([numbers]))[0].tolist()
    return answer


def write(store: Path, name: str, *, network: torch.nn.Module | None = None, **config: Any) -> None:
    made = serving_models.Linear() if network is None else network
    serving_models.write_torchscript(store, made, name, config={"input": serving_models.LINEAR_INPUT} | config)


def gpu_ids(server: Server, model: str) -> list[str]:
    """Of its workers, in their order, as their description has them."""
    return [row["gpuUsage"].partition(" ")[0] for row in server.describe(model)["workers"]]


def test_four_workers_share_two_devices(server: Server) -> None:
    give_device(server)
    write(server.store, "two", minWorkers=4, maxWorkers=4)
    server.start("--models", "two.mar")
    described = server.describe("two")
    assert (described["device"], described["deviceType"], described["copies"]) == ("simdev:0", "gpu", 2)
    assert gpu_ids(server, "two") == ["gpuId::0", "gpuId::1"] * 2
    assert all(row["gpu"] for row in described["workers"])
    for count in range(40):
        numbers = [float(count), *NUMBERS[1:]]
        assert server.predict("two", numbers).json == pytest.approx(linear(numbers), abs=1e-4)


def test_a_model_grows_onto_more_devices_and_comes_back_from_them(server: Server) -> None:
    give_device(server, devices=3)
    write(server.store, "grows")
    server.start()
    server.manage("POST", "/models?url=grows.mar&initial_workers=1&synchronous=true")
    assert server.describe("grows")["copies"] == 1
    for workers, copies in ((3, 3), (5, 3), (2, 2), (1, 1), (2, 2)):
        server.manage("PUT", f"/models/grows?min_worker={workers}&max_worker={workers}&synchronous=true")
        described = server.describe("grows")
        assert (len(described["workers"]), described["copies"]) == (workers, copies)
        assert server.predict("grows", NUMBERS).json == pytest.approx(linear(NUMBERS), abs=1e-4)


def test_a_model_has_one_worker_on_each_device_unless_it_says_otherwise(server: Server) -> None:
    give_device(server)
    write(server.store, "any")
    write(server.store, "first", deviceIds=[1])
    write(server.store, "host", deviceType="cpu")
    server.start("--models", "any.mar", "first.mar", "host.mar")
    assert gpu_ids(server, "any") == ["gpuId::0", "gpuId::1"]
    assert gpu_ids(server, "first") == ["gpuId::1"]
    assert [row["gpu"] for row in server.describe("host")["workers"]] == [False]


def test_a_device_that_is_not_there_is_refused_and_the_others_are_served(server: Server) -> None:
    give_device(server)
    write(server.store, "fine")
    write(server.store, "far", deviceIds=[1, 7])
    server.start("--models", "fine.mar", "far.mar")
    assert server.predict("fine", NUMBERS).status == 200
    answer = server.ask("POST", "/models?url=far.mar&initial_workers=1&synchronous=true", port="management")
    assert answer.status == 400
    text = "deviceIds [1, 7] in model-config.yaml name GPU 7, but GPUs 0 to 1 are there"
    assert text in answer.json["message"]
    server.wait_for_log(text)


def test_what_fits_nowhere_is_refused_with_both_numbers_and_the_others_are_served(server: Server) -> None:
    give_device(server, at_start="memory bytes=20000000")
    write(server.store, "small")
    write(server.store, "wide", network=serving_models.Wide())
    server.start("--models", "small.mar")
    answer = server.ask("POST", "/models?url=wide.mar&initial_workers=1&synchronous=true", port="management")
    assert answer.status == 507
    assert "wide.mar needs 67.2 MB on simdev:" in answer.json["message"]
    assert " of 20.0 MB are free; use a device with more memory" in answer.json["message"]
    assert server.predict("small", NUMBERS).status == 200


def test_memory_comes_back_when_a_model_goes(server: Server) -> None:
    give_device(server, devices=1, at_start="memory bytes=100000000")
    for name in ("one", "two"):
        write(server.store, name, network=serving_models.Wide())
    server.start("--models", "one.mar")
    answer = server.ask("POST", "/models?url=two.mar&initial_workers=1&synchronous=true", port="management")
    assert answer.status == 507, "both do not fit"
    assert "unregister a model that runs there" in answer.json["message"]
    assert server.predict("one", NUMBERS).status == 200
    for model, url in (("one", "two"), ("two", "one"), ("one", "two")):
        server.manage("DELETE", f"/models/{model}")
        server.manage("POST", f"/models?url={url}.mar&initial_workers=1&synchronous=true")
        assert server.predict(url, NUMBERS).status == 200


def test_what_has_room_on_one_device_only_goes_there(server: Server) -> None:
    give_device(server, at_start="memory bytes=20000000 device=0")
    write(server.store, "any", network=serving_models.Wide())
    write(server.store, "bound", network=serving_models.Wide(), deviceIds=[0])
    server.start("--models", "any.mar")
    assert set(gpu_ids(server, "any")) == {"gpuId::1"}
    assert server.predict("any", NUMBERS).status == 200
    answer = server.ask("POST", "/models?url=bound.mar&initial_workers=1&synchronous=true", port="management")
    assert answer.status == 507
    assert "bound.mar needs 67.2 MB on simdev:0" in answer.json["message"]


def test_models_that_are_loaded_at_once_do_not_all_choose_the_same_device(server: Server) -> None:
    give_device(server)
    for name in ("one", "two"):
        write(server.store, name, network=serving_models.Wide(), minWorkers=1, maxWorkers=1)
    server.start("--models", "one.mar", "two.mar")
    assert {server.describe(name)["device"] for name in ("one", "two")} == {"simdev:0", "simdev:1"}


def test_a_converted_model_that_asks_for_its_inputs_device_runs_on_it(server: Server) -> None:
    give_device(server)
    namespace: dict[str, Any] = {}
    exec(TEXT, namespace)
    network = namespace["Text"]().eval()
    serving_models.write_eager(
        server.store, "text", TEXT, network.state_dict(),
        config={"input": {"dtype": "int64", "shape": [5], "values": [0, 49]}},
    )  # fmt: skip
    server.start("--models", "text.mar")
    described = server.describe("text")
    assert described["state"] == "READY", described
    assert described["lane"] == "native"
    assert described["checks"]["conversion"].startswith("traced"), described["checks"]
    assert described["checks"]["devices"].startswith("the devices that its code names became simdev:")
    ids = [3, 1, 4, 1, 5]
    with torch.no_grad():
        expected = network(torch.tensor([ids]))[0].tolist()
    assert server.predict("text", ids).json == pytest.approx(expected, abs=1e-4)


def test_handlers_of_torchserve_find_their_number_and_stay_on_the_cpu_without_cuda(server: Server) -> None:
    give_device(server)
    write_handler(server.store, "where", WHERE, config={"minWorkers": 2, "maxWorkers": 2})
    server.start("--models", "where.mar")
    assert all(row["gpu"] for row in server.describe("where")["workers"])
    server.wait_for(lambda: all(f"was given GPU {index}" in server.log() for index in (0, 1)), "both workers")
    said = [server.predict("where", NUMBERS).json for _ in range(8)]
    assert {each["chosen"] for each in said} == {"cpu"}
    assert {each["given"] for each in said} <= {0, 1}
    assert not any(each["bad_fork"] for each in said)


@pytest.mark.compiles
def test_a_package_for_the_cpu_is_served_there(server: Server) -> None:
    give_device(server)
    network = serving_models.Linear()
    serving_models.write_package(server.store, network, torch.zeros(2, 4), "package")
    write_again(server.store / "package.mar", server.store / "asks.mar", {"deviceType": "gpu"})
    server.start("--models", "package.mar")
    described = server.describe("package")
    assert (described["device"], described["deviceType"]) == ("cpu", "cpu")
    assert not any(row["gpu"] for row in described["workers"])
    server.wait_for_log("package.pt2 was compiled for the CPU and runs there")
    assert server.predict("package", NUMBERS).json == pytest.approx(linear(NUMBERS), abs=1e-4)
    answer = server.ask(
        "POST", "/models?url=asks.mar&model_name=asks&initial_workers=1&synchronous=true", port="management"
    )
    assert answer.status == 500
    assert "was compiled for the CPU, but model-config.yaml says 'deviceType: gpu'" in json.dumps(answer.json)


def write_again(archive: Path, target: Path, config: dict[str, Any]) -> None:
    """The archive with more in its model-config.yaml."""

    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            if name == "model-config.yaml":
                content = json.dumps(json.loads(content) | config).encode()
            copy.writestr(name, content)
