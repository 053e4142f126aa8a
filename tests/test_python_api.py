"""`pyserve.serve` and `pyserve.Client`, as a program uses them."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyserve
from pyserve import serving
from pyserve.client import Client
from pyserve.client_calls import _decoded, _encoded, arrays_in, plain_call
from pyserve.serving import ServingError, _in_eval_mode, input_texts, written_module
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 120


class Two(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": a + b, "product": a * b}


def test_importing_it_costs_nothing() -> None:
    code = (
        "import sys, pyserve\npyserve.Client('http://127.0.0.1:1')\npyserve.serve\n"
        "assert not {'torch', 'numpy', 'uvloop', 'yaml'} & set(sys.modules)\npyserve.asgi.application\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pyserve.nothing


class Labelled(torch.Tensor):
    """As of a library that has kinds of tensors of its own."""


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3), np.array([[1]], ">i4"), np.zeros((0, 2), np.uint8),
        np.array([True, False]), np.arange(4.0)[::2], torch.ones(2, 1, dtype=torch.bfloat16),
        torch.arange(4).reshape(2, 2).T, torch.zeros(0, 3), torch.tensor([1.5], dtype=torch.float16),
    ],
    ids=str,
)  # fmt: skip
def test_arrays_are_the_same_after_both_ways(array: Any) -> None:
    head, tail = _encoded({"x": array}, ["y"])
    said = json.loads(head)
    entry = said["inputs"][0]
    assert entry["parameters"]["binary_data_size"] == len(tail) and said["outputs"] == [{"name": "y"}]
    answer = json.dumps({"outputs": said["inputs"]}).encode()
    is_torch = isinstance(array, torch.Tensor)
    found = _decoded(answer + tail, str(len(answer)), is_torch)["x"]
    assert type(found) is type(array) and found.shape == array.shape
    if is_torch:
        assert found.dtype == array.dtype and torch.equal(found, array)
    else:
        assert found.dtype == array.dtype.newbyteorder("=") and np.array_equal(found, array)


def test_what_cannot_be_sent_is_named() -> None:
    with pytest.raises(TypeError, match="input 'x' has dtype complex64"):
        _encoded({"x": np.zeros(1, np.complex64)}, [])
    with pytest.raises(ValueError, match="no address of a server"):
        Client("ftp://host").is_ready()
    assert Client("http://[::1]:8080").management_url == "http://[::1]:8081"
    assert Client("https://host").management_url == "https://host"
    with pytest.raises(OSError):
        Client(f"http://127.0.0.1:{free_port()}").models()
    assert not Client(f"http://127.0.0.1:{free_port()}").is_ready()


def test_a_module_is_left_as_it_was() -> None:
    net = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(2).eval())
    with _in_eval_mode(net):
        assert not any(each.training for each in net.modules())
    assert [each.training for each in net.modules()] == [True, True, False]
    assert input_texts([torch.zeros(1, 3, 4)]) == ["float32:3,4"]
    assert input_texts([torch.zeros(2), torch.zeros(1, 2).long()]) == ["input_0=float32:", "input_1=int64:2"]


@pytest.mark.parametrize(
    ("model", "example", "text"),
    [
        (torch.nn.Linear(1, 1), None, "needs example="),
        (torch.nn.Linear(1, 1), torch.tensor(1.0), "the batch as its first dimension"),
        (3, torch.ones(1), "int is neither"),
    ],
)
def test_what_cannot_be_served_says_so(model: Any, example: Any, text: str) -> None:
    with pytest.raises(pyserve.ServingError, match=text):
        pyserve.serve(model, example=example, block=False)


class Deployed(Client):
    """Of a server whose model, "pair" or "one", somebody else replaces."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1")
        self.names = {"pair": ["a", "b"], "one": ["a"]}

    def _ask(self, method: str, url: str, path: str, body: Any = None, headers: Any = None) -> Any:
        names = self.names[path.split("/")[3]]
        if method == "GET":
            return json.dumps({"inputs": [{"name": name} for name in names]}).encode(), {}
        size = int(headers["Inference-Header-Content-Length"])
        told = json.loads(body[:size])["inputs"]
        rows = np.frombuffer(body[size:], np.float32).reshape(len(told), 1, 4)
        found = {each["name"]: row for each, row in zip(told, rows, strict=True)}
        if sorted(found) != sorted(names):
            raise pyserve.AnswerError(400, f"the inputs are {names}")
        head, tail = _encoded({"output": np.stack([found[name] for name in names])}, [])
        text = head.replace(b'"inputs"', b'"outputs"')
        return text + tail, {"inference-header-content-length": str(len(text))}


def test_arrays_have_the_order_of_the_version_that_answers() -> None:
    client, x, y = Deployed(), np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    for names in (["a", "b"], ["b", "a"], ["c", "d"]):
        client.names["pair"] = names
        assert np.array_equal(client.predict("pair", (x, y)), np.stack([x, y]))
    for names in (["a"], ["b"]):
        client.names["one"] = names
        assert np.array_equal(client.predict("one", y), y[None])
    client.names["one"] = ["a", "b"]
    with pytest.raises(ValueError, match="one has the inputs a, b, and 1 are given"):
        client.predict("one", y)


@pytest.fixture(scope="module")
def server() -> Iterator[pyserve.Serving]:
    with pyserve.serve(Two(), example=(torch.zeros(1, 4), torch.zeros(1, 4)), port=0, block=False) as started:
        yield started


@pytest.mark.server
def test_arrays_in_and_out(server: pyserve.Serving) -> None:
    a, b = torch.rand(3, 4), torch.rand(3, 4)
    assert server.models == ["two"] and server.client.is_ready()
    found = server.client.predict("two", (a, b))
    assert torch.equal(found["sum"], a + b) and torch.equal(found["product"], a * b)
    named = server.client.predict("two", {"b": b.numpy(), "a": a.numpy()}, outputs=["sum"])
    assert isinstance(named, np.ndarray) and np.array_equal(named, (a + b).numpy())
    plain = server.client.predict("two", {"a": [1, 2, 3, 4], "b": [1, 1, 1, 1]})
    assert plain["sum"] == [2, 3, 4, 5]

    async def many() -> list[Any]:
        async with pyserve.AsyncClient(server.url, management=server.management_url) as client:
            assert list(await client.models()) == ["two"]
            return await asyncio.gather(*(client.predict("two", (a * n, b)) for n in range(16)))

    for number, each in enumerate(asyncio.run(many())):
        assert torch.equal(each["sum"], a * number + b)


@pytest.mark.server
def test_errors_say_what_the_server_says(server: pyserve.Serving) -> None:
    with pytest.raises(pyserve.AnswerError, match="404: Model not found: tow"):
        server.client.predict("tow", torch.ones(1, 4))
    with pytest.raises(pyserve.AnswerError) as caught:
        server.client.predict("two", (torch.ones(1, 5), torch.ones(1, 4)))
    assert caught.value.status == 400 and "[rows, 4]" in caught.value.message
    with pytest.raises(ValueError, match="two has the inputs a, b, and 1 are given"):
        server.client.predict("two", torch.ones(1, 4))


@pytest.mark.server
def test_managing(server: pyserve.Serving) -> None:
    server.client.scale("two", 2)
    [version] = server.client.versions("two")
    assert version["minWorkers"] == 2
    with pytest.raises(pyserve.AnswerError):
        server.client.register("nowhere.mar")
    with pytest.raises(pyserve.AnswerError):
        server.client.set_default("two", "9.9")
    assert list(server.client.models()) == ["two"]


def test_a_tensor_of_another_class_is_a_tensor() -> None:
    array = torch.ones(2, 3).as_subclass(Labelled)
    assert arrays_in(array) is not None
    assert _encoded({"x": array}, [])[1] == torch.ones(2, 3).numpy().tobytes()


@pytest.mark.parametrize(("inputs", "body"), [
    (list(np.arange(2, dtype=np.float32)), "[0.0, 1.0]"),
    ({"a": np.int64(1), "b": np.float64(2)}, '{"a": 1, "b": 2.0}'),
    ({"x": np.zeros((1, 2), np.float32), "flag": True}, '{"x": [[0.0, 0.0]], "flag": true}'),
    ([[torch.tensor(1), np.bool_(True)]], "[[1, true]]"),
    ([], "[]"), ({}, "{}"),
])  # fmt: skip
def test_numbers_and_arrays_amid_others_are_json(inputs: Any, body: str) -> None:
    assert arrays_in(inputs) is None
    assert plain_call("m", inputs, None).body.decode() == body


@pytest.mark.parametrize(("array", "text"), [
    (np.ma.masked_array(np.zeros(2), mask=[True, False]), "filled"),
    (torch.zeros(1, 2).to_sparse(), "torch.sparse_coo"),
    (torch.zeros(1, 2, device="meta"), "that is meta"),
    (np.zeros(2, np.complex64), "dtype complex64"),
])  # fmt: skip
def test_what_has_no_plain_numbers_is_refused(array: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        _encoded({"x": array}, [])
    with pytest.raises(TypeError, match="set is neither an array nor does it fit JSON"):
        plain_call("m", {1, 2}, None)


def test_a_path_before_the_server_s_own_is_kept() -> None:
    class Answering(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps(self.path).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answering) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            base = f"http://127.0.0.1:{proxy.server_port}"
            with Client(f"{base}/beneath/it/") as client:
                assert client.predict("m", [1]) == "/beneath/it/predictions/m"
            with Client(base) as client:
                assert client.predict("m", [1]) == "/predictions/m"
        finally:
            proxy.shutdown()
    assert Client("http://h:8080/x").management_url == "http://h:8081/x"


@pytest.mark.parametrize(("example", "text"), [
    (torch.zeros(1, 5), r"Linear cannot be called with example= \(float32 \[1, 5\]\): RuntimeError: .*shapes"),
    (np.zeros((1, 4), np.float32), "not ndarray; torch.as_tensor"),
    ([[0.0] * 4], "not list"),
])  # fmt: skip
def test_an_example_that_does_not_fit_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], example: Any, text: str
) -> None:
    with pytest.raises(ServingError, match=text):
        written_module(torch.nn.Linear(4, 2), tmp_path, serving.as_tuple(example), "net")
    assert "Traceback" not in capfd.readouterr().err  # which torch logs by the hundred lines


def test_modules_are_exported_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that export at once get each other's tensors into their programs."""
    others_are_out = threading.Event()
    at_work: list[int] = []
    exported = serving._exported

    def watched(*arguments: Any) -> Any:
        at_work.append(1)
        assert len(at_work) == 1
        others_are_out.wait(0.2)  # long enough for another one to come in, if it could
        try:
            return exported(*arguments)
        finally:
            at_work.pop()

    monkeypatch.setattr(serving, "_exported", watched)
    found: dict[int, Path] = {}

    def write(number: int) -> None:
        found[number] = written_module(torch.nn.Linear(4, 2), tmp_path, (torch.zeros(1, 4),), f"net{number}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.suffix for path in found.values()} == {".pt2"}


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("[::1]", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_addresses_of_version_6_are_written_as_urls_have_them(
    monkeypatch: pytest.MonkeyPatch, host: str, shown: str
) -> None:
    flags: list[str] = []
    monkeypatch.setattr(serving, "_started", lambda model, folder, example, name, given: flags.extend(given))
    pyserve.serve("net.pt2", host=host, port=0, block=False)
    assert f"http://{shown}:0" in flags


@pytest.mark.parametrize("name", ["a/b", "a\nb", "a=b", "a,b"])
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(ServingError, match=r"name='a"):
        pyserve.serve(torch.nn.Linear(4, 2), example=torch.zeros(1, 4), name=name, port=0, block=False)


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_ends_with_the_program_that_began_it(tmp_path: Path, number: signal.Signals) -> None:
    torch.jit.script(torch.nn.Linear(4, 2)).save(str(tmp_path / "net.pt"))
    code = (
        "import os, sys, torch, pyserve\n"
        "server = pyserve.serve(sys.argv[1], example=torch.zeros(1, 4), port=0, block=False)\n"
        "print(server._process.pid, flush=True)\nos.kill(os.getpid(), int(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "net.pt"), str(int(number))]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == -number
    try:
        server = os.pidfd_open(int(ran.stdout))
    except ProcessLookupError:
        return
    try:
        assert select.select([server], [], [], LIMIT_S)[0], "the server has stayed"
    finally:
        os.close(server)
