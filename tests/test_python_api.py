"""`pyserve.serve` and `pyserve.Client`, as a program uses them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyserve
from pyserve.client import Client, _decoded, _encoded
from pyserve.serving import _in_eval_mode, _input_texts
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[1]


class Two(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": a + b, "product": a * b}


def test_importing_it_costs_nothing() -> None:
    code = (
        "import sys, pyserve\npyserve.Client('http://127.0.0.1:1')\npyserve.serve\n"
        "assert not {'torch', 'numpy', 'uvloop', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pyserve.nothing


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
    assert _input_texts([torch.zeros(1, 3, 4)]) == ["float32:3,4"]
    assert _input_texts([torch.zeros(2), torch.zeros(1, 2).long()]) == ["input_0=float32:", "input_1=int64:2"]


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
