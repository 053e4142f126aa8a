"""One front end and two answer the same: thousands of requests, right ones and faulty ones, to a server of each."""

from __future__ import annotations

import http.client
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.fronts.odd_requests import MODELS, Odd, OddRequests
from tests.support.front_ends import scrape
from tests.support.serving import SEED, Server
from tests.support.serving_models import Linear, write_torchscript

pytestmark = pytest.mark.server

COUNT = 3000
# Of each answer: it says when, and no two are alike.
_OF_THE_MOMENT = ("date", "x-request-id")


class Same(torch.nn.Module):
    """x -> x"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Half(torch.nn.Module):
    """[n, 4] -> [n, 4] of float16, which front ends leave to the engine."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.half()


class Sum(torch.nn.Module):
    """[n, 3] -> [n]"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(1)


class Total(torch.nn.Module):
    """[n, 200000] -> [n, 3]"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :3] + x[:, -3:]


class Pair(torch.nn.Module):
    """[n, 4] -> two outputs."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x > 0


class Odds(torch.nn.Module):
    """[n, 4] -> NaN and infinities for some numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x)


class Square(torch.nn.Module):
    """[n, 4] -> [n, 2, 2]"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, 2, 2)


class Seen(NamedTuple):
    """An answer, without what is of the moment."""

    line: tuple[int, int, str]
    headers: list[tuple[str, str]]
    body: bytes


def write_models(store: Path) -> None:
    def write(name: str, network: torch.nn.Module, dtype: str = "float32", **more: object) -> None:
        entry = {"dtype": dtype, "shape": list(MODELS[name][1]), **more}
        write_torchscript(store, network, name, config={"input": entry, "batchSize": 4})

    write("linear", Linear())
    write_torchscript(store, Linear(1), "linear", version="2.0", file="linear2",
                      config={"input": {"dtype": "float32", "shape": [4]}})  # fmt: skip
    write("whole", Same(), "int64")
    write("bytes", Same(), "uint8")
    write("double", Same(), "float64")
    write("single", Same())
    write("scalar", Sum())
    write("half", Half())
    write("pair", Pair())
    write("odd", Odds())
    write("bounded", Same(), values=[-5, 5])
    write("free", Square(), pad_to=[4], shape=[-1])
    write_torchscript(store, Square(), "named", config={
        "input": {"dtype": "float32", "shape": [4], "name": "x"}, "output": "scores",
    })  # fmt: skip
    write("large", Same())
    write("wide", Total())


def infer_body(data: str) -> bytes:
    return f'{{"inputs":[{{"name":"x","shape":[1,4],"datatype":"FP32","data":{data}}}]}}'.encode()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """With one front end, and with two."""
    store = tmp_path_factory.mktemp("store")
    write_models(store)
    cache = tmp_path_factory.mktemp("cache")
    made = [Server(tmp_path_factory.mktemp(f"fronts{count}"), store, cache) for count in (1, 2)]
    try:
        for count, server in enumerate(made, 1):
            server.start("--models", "all", "--front-ends", str(count))
        yield made
    finally:
        for server in made:
            server.run("stop")
            server.kill()


class Asker:
    """A connection that is kept as long as the server keeps it."""

    def __init__(self, server: Server):
        self._server = server
        self._connection: socket.socket | None = None

    def ask(self, request: Odd, number: int) -> Seen:
        if self._connection is None:
            self._connection = self._server.connect()
        lines = [f"{request.method} {request.target} HTTP/1.1", "Host: localhost", f"x-request-id: odd-{number}"]
        lines += [f"{name}: {value}" for name, value in request.headers]
        lines.append(f"Content-Length: {len(request.body)}")
        self._connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + request.body)
        answer = http.client.HTTPResponse(self._connection, method=request.method)
        answer.begin()
        body = answer.read()
        # Of a head that cannot be read nobody knows the id, so that each server makes one.
        told = answer.getheader("x-request-id", "")
        body = body.replace(told.encode(), b"ID") if told else body
        headers = [pair for pair in answer.getheaders() if pair[0].lower() not in _OF_THE_MOMENT]
        if answer.will_close or request.method == "HEAD":
            self.close()
        return Seen((answer.version, answer.status, answer.reason), headers, body)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def test_the_same_requests_get_the_same_answers(servers: list[Server]) -> None:
    print(f"PYSERVE_TEST_SEED={SEED}")
    one, *two = Asker(servers[0]), *(Asker(servers[1]) for _ in range(4))
    statuses: Counter[int] = Counter()
    different = []
    for number, request in enumerate(OddRequests(SEED).take(COUNT)):
        wanted, got = one.ask(request, number), two[number % len(two)].ask(request, number)
        statuses[wanted.line[1]] += 1
        if wanted != got and not _tells_times(wanted):
            different.append((request, wanted, got))
    for each in (one, *two):
        each.close()
    assert not different, f"{len(different)} of {COUNT}, the first: {different[0]}"
    assert statuses[200] > COUNT / 5 and statuses[400] > COUNT / 20, statuses


def _tells_times(answer: Seen) -> bool:
    """Whether it says how long something took."""
    return any(name.lower() == "x-server-timing" or name.lower() == "server-timing" for name, _ in answer.headers)


def test_tensors_have_crossed(servers: list[Server]) -> None:
    """What was compared went both ways: as tensors, and as it was."""
    before = servers[1].metric("pyserve_front_end_tensors_total")
    body = torch.ones(4).numpy().tobytes()
    for _ in range(20):
        assert servers[1].ask("POST", "/predictions/linear", body).status == 200
    assert servers[1].metric("pyserve_front_end_tensors_total") - before == 20
    assert servers[1].ask("POST", "/predictions/linear", body, {"Accept": "text/event-stream"}).status == 200
    assert servers[1].metric("pyserve_front_end_tensors_total") - before == 20


# Of processes, and of time.
_NOT_COUNTED = (
    "pyserve_front_end_", "process_", "python_", "pyserve_event_loop", "ts_inference_latency", "ts_queue_latency",
)  # fmt: skip


def counters(server: Server) -> dict[str, float]:
    """What counts something: counters, and how often histograms were told something. Not what measures time."""
    lines = scrape(server).splitlines()
    found = {}
    for line in lines:
        name, _, value = line.rpartition(" ")
        plain = name.partition("{")[0]
        if not line.startswith("#") and plain.endswith(("_total", "_count")) and not plain.startswith(_NOT_COUNTED):
            found[name] = float(value)
    return found


def grown(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}


def counted(server: Server, requests: list[Odd]) -> dict[str, float]:
    """By how much counters grow with these requests, one after the other."""
    before = counters(server)
    asker = Asker(server)
    for number, request in enumerate(requests):
        asker.ask(request, number)
    asker.close()
    return grown(counters(server), before)


def test_the_same_requests_are_counted_alike(servers: list[Server]) -> None:
    """Whoever decodes and encodes: each request, each answer, each stage that a body went through."""
    print(f"PYSERVE_TEST_SEED={SEED}")
    requests = list(OddRequests(SEED + 1).take(400))
    one, two = (counted(server, requests) for server in servers)
    assert one == two, {name: (one.get(name), two.get(name)) for name in one | two if one.get(name) != two.get(name)}
    for name in ("pyserve_preprocess_duration_seconds_count", "pyserve_postprocess_duration_seconds_count"):
        assert sum(value for key, value in two.items() if key.startswith(name)) > 20, name


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/predictions/linear", b'{"data": [1, 2, 3, 4]}', {"Content-Type": "application/json"}),
        ("/v1/models/linear:predict", b'{"instances": [[1, 2, 3, 4]]}', {}),
        ("/v2/models/linear/infer", infer_body("[1, 2, 3, 4]"), {}),
        ("/v2/models/linear/infer", infer_body("[[1, 2, 3, 4]]"), {}),
        ("/predictions/wide", bytes(800_000), {"Content-Type": "application/octet-stream"}),
    ],
)  # fmt: skip
def test_what_front_ends_decode(servers: list[Server], path: str, body: bytes, headers: dict[str, str]) -> None:
    before = servers[1].metric("pyserve_front_end_tensors_total")
    answers = [server.ask("POST", path, body, headers) for server in servers]
    assert answers[0].status == answers[1].status == 200 and answers[0].body == answers[1].body
    assert servers[1].metric("pyserve_front_end_tensors_total") == before + 1
