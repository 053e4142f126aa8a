"""A whole server whose device is lost: who is answered what, what comes back, and what the supervisor thinks of it."""

from __future__ import annotations

import grpc
import psutil
import pytest
import torch

from tests.simdev.loss_ledger import FRAGILE, OTHER, PLAIN, SEEDS, keep_breaking, write_models
from tests.simdev.serving import fault, give_device
from tests.support.grpc_calls import PREDICTIONS, Stub
from tests.support.serving import Server
from tests.support.serving_models import Linear

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = [pytest.mark.server, pytest.mark.accelerator]

STRICT = "strict_free on=1"


@pytest.fixture
def broken(server: Server) -> Server:
    """Serves a model on each of two devices and one on the CPU."""
    give_device(server)
    server.environment["PYSERVE_DEVICE_LOSSES_MAX"] = "100"
    server.start("--models", *write_models(server.store))
    return server


def is_right(server: Server, name: str) -> bool:
    answer = server.predict(name, [1.0, 2.0, 3.0, 4.0])
    expected = Linear(SEEDS[name])(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))[0]
    return answer.status == 200 and bool(torch.allclose(torch.tensor(answer.json), expected, atol=1e-4))


def wait_for_another(server: Server, pid: int) -> None:
    """Returns when the server's process ``pid`` has been replaced."""
    supervisor = psutil.Process(server.running.pid)
    server.wait_for(lambda: [child.pid for child in supervisor.children()] not in ([], [pid]), "the other process")


@pytest.mark.parametrize("frees", ["", STRICT], ids=["frees", "raises when memory is let go"])
def test_all_models_are_back_in_another_process_and_nobody_is_without_an_answer(broken: Server, frees: str) -> None:
    supervisor = broken.running.pid
    ledger = keep_breaking(broken, requests=1500, breaks=2, frees=frees)
    print(ledger.statuses, ledger.recovered_s)
    assert broken.running.pid == supervisor and ledger.statuses[f"{FRAGILE} 503"] >= 2
    assert all(is_right(broken, name) for name in (FRAGILE, OTHER, PLAIN))
    log = broken.log()
    assert log.count("is lost, and with it all") == 2, "the cause is logged once"
    assert log.count("a device is lost (") == 2 and "; restarting" not in log
    assert "device-side assert" in log and "Traceback" not in log


def test_a_kernel_that_hangs_is_a_lost_device(server: Server) -> None:
    give_device(server)
    archives = write_models(server.store, responseTimeout=1, clientTimeoutInMills=60_000)
    server.start("--models", *archives)
    pid = server.process.pid
    fault(server, "hang at=0 device=0")
    with server.client() as client:
        assert client.predict(FRAGILE, [1.0, 2.0, 3.0, 4.0]).status == 504
        assert client.predict(OTHER, [1.0, 2.0, 3.0, 4.0]).status == 200, "the others are served until it is given up"
    wait_for_another(server, pid)
    assert all(is_right(server, name) for name in (FRAGILE, OTHER, PLAIN))
    log = server.log()
    assert "it does not answer: a batch of fragile 1.0 has run for" in log and "; restarting" not in log


def test_a_device_that_is_lost_again_and_again_is_left_alone_while_the_others_are_served(server: Server) -> None:
    give_device(server)
    server.environment["PYSERVE_DEVICE_LOSSES_MAX"] = "1"
    server.start("--models", *write_models(server.store))
    for _ in range(2):
        server.wait_for(
            lambda: is_right(server, FRAGILE), "it to be loaded: a load on a device that breaks just FAILED"
        )
        pid = server.process.pid
        fault(server, "break at=0 device=0")
        refused = server.predict(FRAGILE, [1.0, 2.0, 3.0, 4.0])
        assert refused.status == 503 and refused.detail["reason"] == "device lost"
        assert int(refused.headers["retry-after"]) > 0
        wait_for_another(server, pid)
    assert is_right(server, OTHER) and is_right(server, PLAIN)
    described = server.describe(FRAGILE)
    assert described["state"] == "FAILED" and "was lost 2 times in a row" in described["error"]
    refused = server.predict(FRAGILE, [1.0, 2.0, 3.0, 4.0])
    assert refused.status == 503 and "left alone" in refused.detail["text"]
    assert server.describe(OTHER)["state"] == server.describe(PLAIN)["state"] == "READY"


@pytest.mark.parametrize(("at", "restarts"), [(0, 0), (2, 1)], ids=["dead from the start", "breaks while it is loaded"])
def test_a_model_that_cannot_be_loaded_for_its_device_leaves_the_others_alone(
    server: Server, at: int, restarts: int
) -> None:
    give_device(server, at_start=f"break at={at} device=0")
    server.start("--models", *write_models(server.store))
    assert is_right(server, OTHER) and is_right(server, PLAIN)
    described = server.describe(FRAGILE)
    assert described["state"] == "FAILED" and "device-side assert" in described["error"]
    assert server.log().count(": a device is lost (") == restarts and "; restarting" not in server.log()


def test_grpc_clients_are_answered_and_find_the_next_process(server: Server) -> None:
    give_device(server)
    server.start("--grpc", "true", "--models", *write_models(server.store))
    pid = server.process.pid
    with Stub(server.grpc(), PREDICTIONS) as stub:
        numbers = torch.tensor([1.0, 2.0, 3.0, 4.0]).numpy().tobytes()
        assert stub.Predictions(model_name=FRAGILE, input={"data": numbers}).prediction
        fault(server, "break at=0 device=0")
        with pytest.raises(grpc.RpcError) as refused:
            stub.Predictions(model_name=FRAGILE, input={"data": numbers})
        assert "is lost" in refused.value.details()
    wait_for_another(server, pid)
    with Stub(server.grpc(), PREDICTIONS) as stub:
        assert stub.Ping().health and stub.Predictions(model_name=FRAGILE, input={"data": numbers}).prediction


@pytest.mark.nightly
def test_no_request_is_lost_doubled_or_swapped_under_many_breaks(server: Server) -> None:
    give_device(server)
    server.environment["PYSERVE_DEVICE_LOSSES_MAX"] = "1000000"
    server.start("--models", *write_models(server.store))
    ledger = keep_breaking(server, requests=100_000, breaks=60, frees=STRICT)
    assert ledger.answered >= 100_000 and "; restarting" not in server.log()
