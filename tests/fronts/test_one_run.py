"""A request runs its model once and is counted once, whoever makes its answer, in whatever form it was asked for."""

# TorchScript reads the annotations of `forward`, and takes what has none for a tensor.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import asyncio
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.fronts.test_fast_path import JSON, RAW
from tests.support.front_ends import scrape
from tests.support.networks import Gate, counted
from tests.support.packing import TENSOR_CONFIG, pack
from tests.support.serving import Server
from tests.support.two_ways import Site, Way, post, run, site

# The first number of all requests here: nothing that a model is tried with begins so.
FIRST = 41
SIZE_MAX = 20_000  # of answers
ITEM = struct.pack("<4f", FIRST, -1.0, 0.0, 3.0)


class Counted(nn.Module):
    """Its subclasses answer something that is no plain tensor, or none that has words everywhere."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path


class Plain(Counted):
    def forward(self, x):
        return counted(self.path, x, float(x[0, 0].item())) * 2


class NotFinite(Counted):
    def forward(self, x):
        return torch.log(counted(self.path, x, float(x[0, 0].item())))


class Half(Counted):
    def forward(self, x):
        return counted(self.path, x, float(x[0, 0].item())).half()


class Negated(Counted):
    """By a mark, which its memory does not show."""

    def forward(self, x):
        return torch._neg_view(counted(self.path, x, float(x[0, 0].item())))


class Brain(Counted):
    def forward(self, x):
        return counted(self.path, x, float(x[0, 0].item())).to(torch.bfloat16)


class Complex(Counted):
    def forward(self, x):
        return torch.complex(counted(self.path, x, float(x[0, 0].item())), x)


class Two(Counted):
    def forward(self, x):
        return counted(self.path, x, float(x[0, 0].item())) * 2, x > 0


class Named(Counted):
    def forward(self, x):
        return {"twice": counted(self.path, x, float(x[0, 0].item())) * 2, "sum": x.sum(1)}


class Listed(Counted):
    def forward(self, x):
        return [counted(self.path, x, float(x[0, 0].item())) * 2, x.sum(1)]


class Nothing(Counted):
    """Of no numbers for real requests."""

    def forward(self, x):
        return counted(self.path, x, float(x[0, 0].item()))[:, : 0 if float(x[0, 0].item()) > 40 else 4]


class Short(Counted):
    """A row too few."""

    def forward(self, x):
        return counted(self.path, x, float(x[0, 0].item()))[1 if float(x[0, 0].item()) > 40 else 0 :]


class OneNumber(Counted):
    """For the whole batch."""

    def forward(self, x):
        y = counted(self.path, x, float(x[0, 0].item()))
        return y.sum() if float(x[0, 0].item()) > 40 else y


class TooLarge(Counted):
    def forward(self, x):
        return counted(self.path, x, float(x[0, 0].item())).repeat(1, 2000 if float(x[0, 0].item()) > 40 else 1)


class TooLargeAsText(Counted):
    def forward(self, x):
        return counted(self.path, x, float(x[0, 0].item())).repeat(1, 1000 if float(x[0, 0].item()) > 40 else 1)


class Raising(Counted):
    def forward(self, x):
        y = counted(self.path, x, float(x[0, 0].item()))
        if float(x[0, 0].item()) > 40:
            raise RuntimeError("planted")
        return y


KINDS = (
    Plain, Negated, NotFinite, Half, Brain, Complex, Two, Named, Listed, Nothing, Short, OneNumber, TooLarge,
    TooLargeAsText, Raising,
)  # fmt: skip


def as_json(item: bytes) -> bytes:
    return json.dumps(struct.unpack("<4f", item)).encode()


def binary(item: bytes, *, wants_binary: bool) -> tuple[str, tuple[str, ...], bytes]:
    entry = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": len(item)}}
    text = json.dumps({"id": "a", "inputs": [entry], "parameters": {"binary_data_output": wants_binary}}).encode()
    return "/v2/models/m/infer", (f"Inference-Header-Content-Length: {len(text)}",), text + item


def forms(item: bytes) -> dict[str, tuple[str, tuple[str, ...], bytes]]:
    """Path, header lines and body of a request in each form."""
    as_text, as_bytes = "Accept: application/json", "Accept: application/octet-stream"
    entry = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": struct.unpack("<4f", item)}
    return {
        "raw": ("/predictions/m", (RAW,), item),
        "raw, JSON back": ("/predictions/m", (RAW, as_text), item),
        "JSON": ("/predictions/m", (JSON,), as_json(item)),
        "JSON, raw back": ("/predictions/m", (JSON, as_bytes), as_json(item)),
        "instances": ("/v1/models/m:predict", (JSON,), b'{"instances": [%b]}' % as_json(item)),
        "binary": binary(item, wants_binary=True),
        "binary, JSON back": binary(item, wants_binary=False),
        "infer, JSON": ("/v2/models/m/infer", (JSON,), json.dumps({"inputs": [entry]}).encode()),
        "infer, JSON, binary back": ("/v2/models/m/infer", (JSON,), json.dumps(
            {"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()),
    }  # fmt: skip


FORMS = tuple(forms(ITEM))
NATIVE = ("raw", "raw, JSON back", "JSON", "JSON, raw back", "binary", "binary, JSON back")
_COUNTED = re.compile(r"(?!python_|process_)(\w+_(?:total|count)|Requests[245]XX\w*)(\{[^}]*\})? ([0-9.e+]+)$")
_BATCHES = re.compile(r"_batch_|staging|inference_duration|queue_duration|_h2d_|_d2h_|_gap_|_compute_")


def numbers(text: str) -> dict[str, float]:
    """What counts something."""
    found = filter(None, map(_COUNTED.match, text.splitlines()))
    return {f"{each[1]}{each[2] or ''}": float(each[3]) for each in found}


def counted_by(made: Site) -> dict[str, float]:
    return numbers(made.services.metrics.render().decode())


def grown(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of the gate's file."""
    return tmp_path / "gate"


async def ask(made: Site, way: Way, gate: Gate, form: str, number: int) -> tuple[bytes, int, int, dict[str, float]]:
    """The answer, runs and rows, and what was counted."""
    target, lines, body = forms(ITEM)[form]
    before, runs, rows = counted_by(made), gate.runs_of(FIRST), gate.rows_of(FIRST)
    wire = way.wire()
    wire.send(post(target, body, *lines, id=f"n{number}"))
    told = await wire.answers()
    if not wire.is_over:
        wire.transport.lose()
    return told, gate.runs_of(FIRST) - runs, gate.rows_of(FIRST) - rows, grown(counted_by(made), before)


@pytest.mark.parametrize("kind", KINDS)
def test_each_request_runs_once_and_is_counted_once(store: Path, path: Path, kind: type[Counted]) -> None:
    gate = Gate(path)
    pack(store, network=kind(str(path)))

    async def test() -> None:
        for form in FORMS:  # each the first that a server sees
            async with site(store, gate=gate, max_response_size=SIZE_MAX) as made:
                for number in range(3):
                    fast = await ask(made, made.fast, gate, form, number)
                    slow = await ask(made, made.slow, gate, form, number)
                    # One that fails is run again by itself, which is for batches to find out whose fault it is.
                    assert fast == slow, (form, number)
                    assert kind is Raising or fast[1:3] == (1, 1), (form, number)
                assert (made.taken > 0) == (form in NATIVE) and not made.lane("m").in_flight_count, form
                assert made.fast.connections.budget.size == 0

    run(test())


@pytest.mark.parametrize("kind", [NotFinite, Two, Half, Plain, Named, Complex, Negated])
def test_a_batch_of_all_forms_is_run_once(store: Path, path: Path, kind: type[Counted]) -> None:
    """While one runs the others gather: natively taken ones and others, whose outputs have words natively or not."""
    gate = Gate(path)
    config = f"{TENSOR_CONFIG}batchSize: 16\nmaxBatchDelay: 0\n"
    pack(store, network=kind(str(path)), config=config)

    async def test() -> None:
        async with site(store, gate=gate, max_response_size=SIZE_MAX) as made:
            await made.until(lambda: made.lane("m").proving is None)
            for _ in range(3):
                gate.shut()
                rows, before, wires = gate.rows_of(FIRST), counted_by(made), []
                first = made.fast.wire()
                first.send(post(*_target(FORMS[0]), id="first"))
                await made.until(lambda: made.lane("m").core.queue_size == 0)
                for number, form in enumerate([*FORMS, *FORMS]):
                    way = (made.fast, made.slow)[number // len(FORMS)]
                    wires.append((form, way.wire()))
                    wires[-1][1].send(post(*_target(form), id=f"n{number % len(FORMS)}"))
                gate.open()
                assert await first.answers()
                told = [(form, await wire.answers()) for form, wire in wires]
                assert told[: len(FORMS)] == told[len(FORMS) :]
                await made.until(lambda: not made.lane("m").in_flight_count)
                assert gate.rows_of(FIRST) - rows == 1 + 2 * len(FORMS)
                more = grown(counted_by(made), before)
                assert sum(value for name, value in more.items() if name.startswith("pyserve_requests_total")) == (
                    1 + 2 * len(FORMS)
                ), more

    run(test())


def _target(form: str) -> tuple[Any, ...]:
    target, lines, body = forms(ITEM)[form]
    return target, body, *lines


@pytest.mark.parametrize("kind", [NotFinite, Two, Plain, TooLarge])
@pytest.mark.parametrize("form", NATIVE)
@pytest.mark.parametrize("goes", [False, True])
def test_what_is_taken_over_while_it_runs_is_run_once(
    store: Path, path: Path, kind: type[Counted], form: str, *, goes: bool
) -> None:
    """By its connection, on which more comes; also of a model that is about to go."""
    gate = Gate(path)
    pack(store, network=kind(str(path)))

    async def ask_twice(made: Site, way: Way) -> bytes:
        gate.shut()
        wire, runs = way.wire(), gate.runs_of(FIRST)
        wire.send(post(*_target(form), id="one"))
        await made.until(lambda: gate.runs_of(FIRST) > runs)
        wire.send(post("/none", b"", id="two"))
        going = made.registry.unregister("m", None) if goes else None
        task = None if going is None else asyncio.ensure_future(going)
        await asyncio.sleep(0)
        gate.open()
        told = await wire.answers(2)
        if task is not None:
            await task
        assert gate.runs_of(FIRST) - runs == 1
        return told

    async def test() -> None:
        told = []
        for is_fast in (True, False):
            async with site(store, gate=gate, max_response_size=SIZE_MAX) as made:
                before = counted_by(made)
                way = made.fast if is_fast else made.slow
                answer = await ask_twice(made, way)
                more = {name: value for name, value in grown(counted_by(made), before).items()
                        if not _BATCHES.search(name)}  # fmt: skip
                told.append((answer, more))
                assert made.taken == is_fast and way.connections.budget.size == 0
        assert told[0] == told[1]

    run(test())


# --- several front ends -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fronts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, Gate]]]:
    """A server with two front ends and all of the models, and what their runs are counted with."""
    folder = tmp_path_factory.mktemp("runs")
    server = Server(folder)
    gates = {}
    for kind in KINDS:
        gates[kind.__name__] = Gate(folder / f"gate-{kind.__name__}")
        pack(server.store, name=kind.__name__, network=kind(str(gates[kind.__name__].path)))
    (folder / "config.properties").write_text(f"max_response_size={SIZE_MAX}\n")
    server.start("--models", "all", "--front-ends", "2", "--ts-config", str(folder / "config.properties"))
    try:
        yield server, gates
    finally:
        server.run("stop")
        server.kill()


def totals(server: Server) -> dict[str, float]:
    return numbers(scrape(server))


@pytest.mark.server
@pytest.mark.parametrize("kind", [each.__name__ for each in KINDS])
def test_front_ends_have_each_request_run_once(fronts: tuple[Server, dict[str, Gate]], kind: str) -> None:
    """Whatever becomes of its output, and whether they or endpoints make its answer."""
    server, gates = fronts
    gate, seen = gates[kind], []
    for query in ("", "?plain=1"):  # with a query, which nobody reads, requests go as they are
        before, told = totals(server), []
        for form, (target, lines, body) in forms(ITEM).items():
            path = re.sub(r"/m(?=$|[/:])", f"/{kind}", target)
            headers = {**dict(line.split(": ", 1) for line in lines), "x-request-id": "an-id"}
            for _ in range(2):
                runs, rows = gate.runs_of(FIRST), gate.rows_of(FIRST)
                answer = server.ask("POST", path + query, body, headers)
                kept = {name: value for name, value in answer.headers.items() if name != "date"}
                ran = gate.runs_of(FIRST) - runs, gate.rows_of(FIRST) - rows
                assert kind == "Raising" or ran == (1, 1), form
                told.append((answer.status, kept, answer.body, ran))
        more = grown(totals(server), before)
        seen.append((told, {name: value for name, value in more.items() if f'="{kind}"' in name}))
        if not query and kind == "Plain":
            crossed = [value for name, value in more.items() if name.startswith("pyserve_front_end_tensors_total")]
            assert sum(crossed) == 2 * len(FORMS)
    for form, (one, two) in zip(
        [each for each in FORMS for _ in "12"], zip(seen[0][0], seen[1][0], strict=True), strict=True
    ):
        assert one == two, form
    assert seen[0][1] == seen[1][1]
