"""Worker processes asked by many at once: every answer is the one that its row has alone, whatever the model does."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, Answer, Server, at_once
from tests.support.serving_models import LINEAR_INPUT

pytestmark = pytest.mark.server

CLIENTS = 16
BATCHES = {"batchSize": 8, "maxBatchDelay": 30, "minBatch": 4}
# Runs as it is only.
MODEL = """
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.layer = {layer}

        def forward(self, x):
            if torch.jit.is_tracing() or torch.jit.is_scripting() or torch.compiler.is_compiling():
                raise RuntimeError("this model is not to be converted")
            return {result}
"""
LAYERS = {
    "softmax": ("torch.nn.Identity()", "x.softmax(0)"),
    "statistics": ("torch.nn.Identity()", "(x - x.mean(0)) / (1 + x.std(0, correction=0))"),
    "gru": ("torch.nn.GRU(1, 2)", "self.layer(x.unsqueeze(2))[0]"),
    "int8": (
        "torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(4, 4)), {torch.nn.Linear})",
        "self.layer(x)",
    ),
    "linear": ("torch.nn.Linear(4, 3)", "self.layer(x)"),
}
OWN = """
    from ts.torch_handler.base_handler import BaseHandler

    class Handler(BaseHandler):
        def preprocess(self, data):
            return super().preprocess(data).float()

        def postprocess(self, output):
            return output.softmax(0).tolist()
"""


def source(name: str) -> str:
    layer, result = LAYERS[name]
    return textwrap.dedent(MODEL.format(layer=layer, result=result))


def network(name: str) -> torch.nn.Module:
    scope: dict[str, Any] = {}
    exec(source(name), scope)
    made: torch.nn.Module = scope["Model"]().eval()
    return made


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model of each kind; every one runs in worker processes and asks for batches."""
    server = Server(tmp_path_factory.mktemp("batches"))
    config = {**BATCHES, "input": LINEAR_INPUT, "conversion": "python"}
    for name in LAYERS:
        write_handler(server.store, name, None, handler="tensor", model_file=source(name), config=config)
    meant = {**config, "batchDependent": "allowed"}
    write_handler(server.store, "meant", None, handler="tensor", model_file=source("softmax"), config=meant)
    pictures = {**config, "input": {"shape": [1, 2, 2]}}
    write_handler(
        server.store, "saved", None, handler="densenet_handler", model_file=source("softmax"), config=pictures
    )
    samples = {"sample_input.json": "[1, 2, 3, 4]", "sample_input2.json": "[3, 2, 1, 0]"}
    own = textwrap.dedent(OWN)
    for name, files in (("own", samples), ("unknown", None)):
        write_handler(server.store, name, own, files=files, model_file=source("linear"), config=BATCHES)
    server.start("--models", "all")
    try:
        yield server
    finally:
        server.kill()


def ask_at_once(server: Server, name: str, items: list[torch.Tensor]) -> list[Answer]:
    def asking(item: torch.Tensor) -> Callable[[], Answer]:
        return lambda: server.ask("POST", f"/predictions/{name}", json.dumps(item.tolist()).encode(), JSON)

    answers = at_once([asking(item) for item in items])
    assert [answer.status for answer in answers] == [200] * len(items), answers[0].body
    return answers


def items_of(count: int = CLIENTS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(4, generator=generator) * scale for scale in range(1, count + 1)]


@pytest.mark.parametrize("name", LAYERS)
def test_every_answer_is_that_of_its_row_alone(served: Server, name: str) -> None:
    model, items = network(name), items_of()
    with torch.inference_mode():
        expected = [model(item[None])[0] for item in items]
    for answer, wanted in zip(ask_at_once(served, name, items), expected, strict=True):
        torch.testing.assert_close(torch.tensor(answer.json), wanted, rtol=1e-5, atol=1e-5)


def test_saved_tensors_are_those_of_their_requests_alone(served: Server) -> None:
    def asking(item: torch.Tensor) -> Callable[[], Answer]:
        file = io.BytesIO()
        torch.save(item.view(1, 1, 2, 2), file)
        return lambda: served.ask("POST", "/predictions/saved", file.getvalue())

    items = items_of()
    for answer, item in zip(at_once([asking(item) for item in items]), items, strict=True):
        assert torch.equal(torch.load(io.BytesIO(answer.body)), torch.ones(1, 1, 2, 2)), item


def test_an_own_handler_with_samples_is_known(served: Server) -> None:
    for answer in ask_at_once(served, "own", items_of()):
        assert answer.json == [1.0, 1.0, 1.0]


def test_an_own_handler_without_samples_is_believed(served: Server) -> None:
    answers = ask_at_once(served, "unknown", items_of())
    assert any(answer.json != [1.0, 1.0, 1.0] for answer in answers), "batches are run, as it asked for"


def test_batches_that_are_meant_are_run(served: Server) -> None:
    answers = ask_at_once(served, "meant", items_of())
    assert any(answer.json != [1.0] * 4 for answer in answers)


def test_models_that_keep_rows_apart_are_still_run_in_batches(served: Server) -> None:
    ask_at_once(served, "linear", items_of())
    bounds = served.manage("GET", "/models/linear")[0]
    assert bounds["batchSize"] == 8
    assert served.metric("pyserve_batch_size_sum", model="linear") > served.metric(
        "pyserve_batch_size_count", model="linear"
    )
    assert served.metric("pyserve_batch_size_sum", model="softmax") == served.metric(
        "pyserve_batch_size_count", model="softmax"
    )


def test_the_log_says_once_what_differs_and_what_to_do(served: Server) -> None:
    lines = [line for line in served.log().splitlines() if "batches hold one request" in line]
    assert sorted(line.split(" 1.0: ")[0].split()[-1] for line in lines) == [
        "gru", "int8", "own", "saved", "softmax", "statistics"
    ]  # fmt: skip
    assert all("write 'batchDependent: allowed' in model-config.yaml if that is meant" in line for line in lines)


def test_a_description_shows_what_trying_batches_came_to(served: Server) -> None:
    found = {name: served.describe(name)["checks"] for name in ("softmax", "linear", "unknown", "meant")}
    assert found["softmax"]["batchSize"] == 1
    assert found["softmax"]["batches"].startswith("answers depend on the batch: row ")
    assert found["softmax"]["batchNote"].startswith("batches hold one request: answers depend on the batch: ")
    assert (found["linear"]["batchSize"], found["linear"]["batches"]) == (8, "passed")
    assert (found["unknown"]["batchSize"], found["unknown"]["batches"]) == (
        8, "not probed: no sample_input* file in the archive that it answers"
    )  # fmt: skip
    assert (found["meant"]["batchSize"], found["meant"]["batches"]) == (8, "not probed: batchDependent: allowed")
    assert all("batchNote" not in found[name] for name in ("linear", "unknown", "meant"))


def test_a_description_shows_what_a_worker_was_warmed_up_with(served: Server) -> None:
    found = {name: served.describe(name)["checks"]["warmUp"] for name in ("linear", "softmax", "own")}
    known, sizes = "a made-up tensor [4]", [1, 2, 4, 8]
    warmed = found["linear"]["rows"][known]
    late = [f"{known}, {size} rows: it would have taken too long" for size in sizes if size not in warmed]
    assert {1, 8} <= set(warmed) <= set(sizes)
    assert found["linear"].get("leftOut", []) == late  # on a busy machine
    assert found["softmax"]["rows"] == {known: [1]}, "its batches hold one request"
    assert found["own"]["rows"] == {"sample_input.json": [1], "sample_input2.json": [1]}


def test_another_worker_need_not_try_what_is_known(served: Server) -> None:
    served.manage("PUT", "/models/gru?min_worker=2&synchronous=true")
    ask_at_once(served, "gru", items_of(4))
    lines = [line for line in served.log().splitlines() if "gru" in line and "batches hold one request" in line]
    assert len(lines) == 1


def test_a_batch_size_that_is_raised_holds_only_where_batches_keep_answers(served: Server) -> None:
    for name in ("softmax", "linear"):
        served.manage("PUT", f"/models/{name}?batch_size=16")
    ask_at_once(served, "linear", items_of())
    for answer in ask_at_once(served, "softmax", items_of()):
        assert answer.json == [1.0] * 4


def test_a_model_that_cannot_be_answered_fails_at_load_with_the_cause(served: Server) -> None:
    broken = textwrap.dedent(MODEL.format(layer="None", result="object()"))
    write_handler(served.store, "broken", None, handler="tensor", model_file=broken,
                  config={"input": LINEAR_INPUT, "conversion": "python"})  # fmt: skip
    answer = served.ask("POST", "/models?url=broken.mar&initial_workers=1&synchronous=true", port="management")
    assert answer.status >= 400
    assert "the model was tried with a made-up tensor [4] and cannot answer it: " in answer.detail["text"]


def test_a_sample_that_ends_its_worker_does_not_keep_the_model_from_being_served(served: Server) -> None:
    source = """
        import os

        def handle(data, context):
            if data is None:
                return
            if data[0]["body"] == [13]:
                os._exit(3)
            return [row["body"] for row in data]
    """
    write_handler(served.store, "deadly", textwrap.dedent(source), files={"sample_input.json": "[13]"})
    served.manage("POST", "/models?url=deadly.mar&initial_workers=1&synchronous=true")
    assert served.predict("deadly", [1]).json == [1]
    served.wait_for_log("a worker ended while it was tried with the archive's sample_input* files")
