"""The audit in a running server: it finds what is made wrong on purpose, and nobody notices it otherwise."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pyserve.grpc_api.messages import OPEN_INFERENCE
from tests.support.grpc_calls import stub
from tests.support.handler_archives import TUTORIAL, Doubler, write_handler
from tests.support.serving import JSON, LIMIT_S, RAW, SEED, Answer, Server, at_once
from tests.support.serving_models import LINEAR_INPUT, Linear, write_eager, write_torchscript

pytestmark = pytest.mark.server

NICENESS = 10
ALL: dict[str, Any] = {"audit": "100%"}
PAIRS = {"batchSize": 2, "minBatch": 2, "maxBatchDelay": 60_000}

COUNTING = """
def handle(data, context):
    if data is not None:
        return [{"rows": len(data)} for _ in data]
"""

# Tells by its log where it runs, dies when it is told to, but only where the audit runs it.
TELLING = """
import logging
import os

import torch

NICENESS = os.nice(0)


def handle(data, context):
    if data is None:
        return None
    logging.info("niceness %d, optimized %s", os.nice(0), torch._C._get_graph_executor_optimize())
    bodies = [row["body"] for row in data]
    if "die" in bodies and os.nice(0):
        os._exit(7)
    return bodies
"""

WAITING = """
import pathlib, time


def handle(data, context):
    if data is None:
        return None
    while not pathlib.Path("{gate}").exists():
        time.sleep(0.001)
    return [1] * len(data)
"""

STREAMING = """
from ts.handler_utils.utils import send_intermediate_predict_response


def handle(data, context):
    if data is None:
        return None
    send_intermediate_predict_response(["part"] * len(data), context.request_ids, "Intermediate", 200, context)
    return ["end"] * len(data)
"""

# Its table is not in the file: only a plain build has the numbers that the constructor draws.
SEEDED = """
import torch


class Seeded(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.linear = torch.nn.Linear(4, 3)
        self.register_buffer("table", torch.randn(3), persistent=False)

    def forward(self, x):
        return self.linear(x) + self.table
"""

# A trace has one of its branches.
BRANCHING = """
import torch


class Branching(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.weight * 2 if x.sum() > 0 else x * self.weight * 3
"""


class OverTheBatch(torch.nn.Module):
    """[n, 4] -> [n, 4], each row's share of the whole batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, 0)


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("audit"))
    store, described = server.store, {"input": LINEAR_INPUT}
    write_torchscript(store, Linear(), "linear", config={**described, "batchSize": 8, **ALL})
    write_torchscript(store, Linear(), "unaudited", config={**described, "batchSize": 8})
    write_torchscript(store, OverTheBatch(), "shares",
                      config={**described, **PAIRS, **ALL, "batchDependent": "allowed"})  # fmt: skip
    write_handler(store, "doubler", TUTORIAL, network=Doubler(), config={"batchSize": 8, **ALL})
    write_handler(store, "counting", COUNTING, config={**PAIRS, **ALL})
    write_handler(store, "telling", TELLING, config=ALL)
    waiting = WAITING.replace("{gate}", str(server.folder / "gate"))
    write_handler(store, "waiting", waiting, config={"jobQueueSize": 1, **ALL})
    write_handler(store, "streaming", STREAMING, config=ALL)
    with torch.random.fork_rng(devices=[]):
        state = {"linear.weight": torch.ones(3, 4), "linear.bias": torch.zeros(3)}
        write_eager(store, "seeded", SEEDED, state, config={**described, **ALL})
    write_eager(store, "branching", BRANCHING, {"weight": torch.ones(1)},
                config={**described, **ALL, "conversion": "trace"})  # fmt: skip
    server.start("--grpc", "true", "--models", "all")
    try:
        yield server
    finally:
        server.kill()


def audit_processes(server: Server, model: str) -> list[psutil.Process]:
    """The workers of a model that give way to all others."""
    found = []
    for each in server.process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.name() == f"py-{model}" and each.nice() == NICENESS:
                found.append(each)
    return found


def count(server: Server, kind: str, model: str, **labels: str) -> int:
    return int(server.metric(f"pyserve_audit_{kind}_total", model=model, **labels))


def done(server: Server, model: str) -> int:
    return count(server, "requests", model) + count(server, "skipped", model)


def wait_for_audits(server: Server, model: str, wanted: int) -> None:
    """Returns when so many requests were run again or skipped."""
    server.wait_for(lambda: done(server, model) >= wanted, f"{wanted} audits of {model}")


def ask_at_once(server: Server, model: str, bodies: list[bytes], headers: dict[str, str] = JSON) -> list[Answer]:
    return at_once([lambda body=body: server.ask("POST", f"/predictions/{model}", body, headers) for body in bodies])


@pytest.mark.parametrize("model", ["linear", "doubler"])
def test_right_model_differs_in_none_of_hundreds_of_requests(audited: Server, model: str) -> None:
    generator = torch.Generator().manual_seed(SEED)
    network: torch.nn.Module = Linear() if model == "linear" else Doubler()
    asked = 0
    for _ in range(25):
        items = torch.randn(12, 4, generator=generator)
        answers = ask_at_once(audited, model, [json.dumps(item.tolist()).encode() for item in items])
        expected = network(items).tolist()
        assert [answer.json for answer in answers] == [pytest.approx(row, rel=1e-4, abs=1e-6) for row in expected]
        asked += len(answers)
        wait_for_audits(audited, model, asked)
    assert count(audited, "requests", model) == 300
    assert count(audited, "differences", model) == 0
    assert audited.metric("pyserve_requests_total", model=model) == 300


def test_raw_tensors_and_both_versions_of_kserve_are_audited(audited: Server) -> None:
    before, all_before = count(audited, "requests", "linear"), done(audited, "linear")
    rows = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
    flat = [number for row in rows for number in row]
    tensor = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": flat}]}
    binary = {**tensor, "parameters": {"binary_data_output": True}}
    calls = [
        ("/predictions/linear", torch.tensor(rows[0]).numpy().tobytes(), RAW),
        ("/v1/models/linear:predict", json.dumps({"instances": rows}).encode(), JSON),
        ("/v2/models/linear/infer", json.dumps(tensor).encode(), JSON),
        ("/v2/models/linear/infer", json.dumps(binary).encode(), JSON),
    ]
    for path, body, headers in calls:
        assert audited.ask("POST", path, body, headers).status == 200
    wait_for_audits(audited, "linear", all_before + len(calls))
    assert count(audited, "requests", "linear") == before + len(calls)
    assert count(audited, "differences", "linear") == 0


def test_calls_of_grpc_are_audited(audited: Server) -> None:
    before, all_before = count(audited, "requests", "linear"), done(audited, "linear")
    rows = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    tensor = {"name": "input0", "datatype": "FP32", "shape": [2, 4]}
    raw = {"inputs": [tensor], "raw_input_contents": [rows.numpy().tobytes()]}
    lists = {"inputs": [{**tensor, "contents": {"fp32_contents": rows.reshape(-1).tolist()}}]}
    with stub(audited) as predictions:
        predictions.Predictions(model_name="linear", input={"data": rows[0].numpy().tobytes()})
    with stub(audited, f"{OPEN_INFERENCE}.GRPCInferenceService") as inference:
        for fields in (raw, lists):
            inference.ModelInfer(model_name="linear", **fields)
    wait_for_audits(audited, "linear", all_before + 3)
    assert count(audited, "requests", "linear") == before + 3
    assert count(audited, "differences", "linear") == 0


def test_difference_of_a_grpc_call_is_found(audited: Server) -> None:
    before = done(audited, "shares")
    fields = {"inputs": [{"name": "input0", "datatype": "FP32", "shape": [2, 4]}],
              "raw_input_contents": [torch.arange(8.0).numpy().tobytes()]}  # fmt: skip
    with stub(audited, f"{OPEN_INFERENCE}.GRPCInferenceService") as inference:
        inference.ModelInfer(model_name="shares", **fields)
    wait_for_audits(audited, "shares", before + 1)
    assert audited.manage("GET", "/models/shares")[0]["checks"]["audit"]["differences"] >= 1


@pytest.mark.parametrize("model", ["counting", "shares"])
def test_answer_that_depends_on_the_batch_is_found(audited: Server, model: str) -> None:
    bodies = [b"[1.0, 2.0, 3.0, 4.0]", b"[4.0, 3.0, 2.0, 1.0]"]
    before, differed_before = done(audited, model), count(audited, "differences", model)
    answers = ask_at_once(audited, model, bodies)
    assert [answer.status for answer in answers] == [200, 200]
    wait_for_audits(audited, model, before + 2)
    assert count(audited, "differences", model) == differed_before + 2
    found = [line for line in audited.log().splitlines() if f"{model} 1.0: the audit got another answer" in line]
    assert len(found) == 1  # later ones are only counted
    told = audited.describe(model)["checks"]["audit"]["firstDifference"]
    assert told["requestId"] in found[0] and told["sha256"] in found[0]
    if not differed_before:
        assert told["requestId"] in [answer.headers["x-request-id"] for answer in answers]
        assert told["sha256"] in [hashlib.sha256(body).hexdigest() for body in bodies]


def test_wrong_graph_that_the_user_insists_on_is_found(audited: Server) -> None:
    answers = [audited.predict("branching", [sign] * 4).json for sign in (1.0, -1.0)]
    assert answers in ([[2.0] * 4, [-2.0] * 4], [[3.0] * 4, [-3.0] * 4])  # one of them is of the other branch
    wait_for_audits(audited, "branching", 2)
    assert count(audited, "requests", "branching") == 2
    assert count(audited, "differences", "branching") == 1


def test_eager_model_is_built_plainly(audited: Server) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        torch.nn.Linear(4, 3)  # as the constructor does
        table = torch.randn(3)
    answer = audited.predict("seeded", [1.0, 2.0, 3.0, 4.0])
    assert answer.json == pytest.approx((10 + table).tolist(), rel=1e-5)
    wait_for_audits(audited, "seeded", 1)
    assert count(audited, "differences", "seeded") == 0


def test_model_without_audit_has_no_process_and_no_series(audited: Server) -> None:
    for _ in range(50):
        assert audited.predict("unaudited", [1.0, 2.0, 3.0, 4.0]).status == 200
    assert not audit_processes(audited, "unaudited")
    text = audited.ask("GET", "/metrics", port="metrics").body.decode()
    assert not [line for line in text.splitlines() if line.startswith("pyserve_audit") and "unaudited" in line]


def test_refusals_by_overload_are_not_audited(audited: Server) -> None:
    def ask() -> Answer:
        return audited.ask("POST", "/predictions/waiting", b"1", JSON)

    with ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(ask) for _ in range(12)]
        # While nothing runs to its end, one runs, one waits, and all others are refused.
        audited.wait_for(lambda: sum(future.done() for future in futures) == 10, "the refusals")
        (audited.folder / "gate").touch()
        answers = [future.result() for future in futures]
    served = sum(answer.status == 200 for answer in answers)
    assert served == 2 and {answer.status for answer in answers} == {200, 503}
    wait_for_audits(audited, "waiting", 12)
    assert count(audited, "requests", "waiting") == served
    assert count(audited, "skipped", "waiting", reason="error") == 12 - served
    assert count(audited, "differences", "waiting") == 0


def test_streamed_answer_arrives_whole_and_is_not_audited(audited: Server) -> None:
    assert audited.predict("streaming", 1).body == b"partend"
    wait_for_audits(audited, "streaming", 1)
    assert count(audited, "skipped", "streaming", reason="streamed") == 1


def test_audit_runs_plainly_and_only_when_nobody_else_wants_the_cpu(audited: Server) -> None:
    before = done(audited, "telling")
    assert audited.predict("telling", "hello").body == b"hello"
    wait_for_audits(audited, "telling", before + 1)
    lines = [line for path in Path(audited.folder, "logs").glob("*.log") for line in path.read_text().splitlines()]
    assert any("niceness 0, optimized True" in line for line in lines)
    assert any(f"niceness {NICENESS}, optimized False" in line for line in lines)


def test_death_of_the_audit_costs_no_answer_and_another_process_follows(audited: Server) -> None:
    assert audited.predict("telling", "die").body == b"die"
    audited.wait_for(lambda: count(audited, "skipped", "telling", reason="process died") == 1, "the death to count")
    before = count(audited, "requests", "telling")
    for _ in range(3):
        assert audited.predict("telling", "live").body == b"live"
    audited.wait_for(lambda: count(audited, "requests", "telling") == before + 3, "the next process")
    assert count(audited, "differences", "telling") == 0
    assert audited.describe("telling")["workers"][0]["status"] == "READY"


def test_process_killed_while_idle_is_followed_by_another(audited: Server) -> None:
    before = count(audited, "requests", "linear")
    audited.predict("linear", [1.0, 2.0, 3.0, 4.0])
    wait_for_audits(audited, "linear", before + 1)
    (process,) = audit_processes(audited, "linear")
    process.kill()
    process.wait(LIMIT_S)
    for _ in range(5):
        assert audited.predict("linear", [1.0, 2.0, 3.0, 4.0]).status == 200
    audited.wait_for(lambda: count(audited, "requests", "linear") > before + 1, "the next process")
    assert [each.pid for each in audit_processes(audited, "linear")] != [process.pid]


def test_process_ends_with_the_last_worker_and_with_the_model(audited: Server) -> None:
    def ask() -> psutil.Process:
        before = done(audited, "counting")
        answers = ask_at_once(audited, "counting", [b"1", b"2"])
        assert [answer.status for answer in answers] == [200, 200]
        wait_for_audits(audited, "counting", before + 2)
        (process,) = audit_processes(audited, "counting")
        return process

    process = ask()
    audited.manage("PUT", "/models/counting?min_worker=0&synchronous=true")
    process.wait(LIMIT_S)
    audited.manage("PUT", "/models/counting?min_worker=1&synchronous=true")
    process = ask()
    audited.manage("DELETE", "/models/counting")
    process.wait(LIMIT_S)
    assert count(audited, "requests", "counting") == 0  # its series are gone with it
