"""`service_envelope`: what handlers get and callers see, through a real server (contract, section 8.5)."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, Answer, Server, at_once

pytestmark = pytest.mark.server

# Doubles numbers, sums lists, and tells bytes as text.
HANDLER = """
def answer(value):
    if isinstance(value, dict):
        value = value.get("data", value)
    if isinstance(value, (bytes, bytearray)):
        return value.decode()
    return [2 * each for each in value] if isinstance(value, list) else 2 * value


def handle(data, context):
    return None if data is None else [answer(row) for row in data]
"""


@contextmanager
def serving(folder: Path, envelope: str) -> Iterator[Server]:
    server = Server(folder)
    write_handler(server.store, "double", HANDLER, config={"batchSize": 4, "minBatch": 2, "maxBatchDelay": 200})
    config = folder / "config.properties"
    config.write_text(f"service_envelope={envelope}\n")
    with server:
        server.start("--models", "all", "--ts-config", str(config))
        yield server


def ask(server: Server, value: Any, path: str = "/predictions/double") -> Answer:
    return server.ask("POST", path, json.dumps(value).encode(), JSON)


def test_json_envelope_joins_the_instances_of_a_batch_and_takes_them_apart(tmp_path: Path) -> None:
    with serving(tmp_path, "json") as server:
        text = base64.b64encode(b"abc").decode()
        wanted: list[tuple[list[Any], list[Any]]] = [
            ([1, 2, 3], [2, 4, 6]), ([], []), ([[1, 2]], [[2, 4]]), ([{"b64": text}, 5], ["abc", 10]),
        ]  # fmt: skip
        answers = at_once([lambda given=given: ask(server, {"instances": given}) for given, _ in wanted])  # type: ignore[misc]
        assert [answer.json for answer in answers] == [{"predictions": expected} for _, expected in wanted]
        for bad in ([1], {"inputs": []}, "x"):
            answer = ask(server, bad)
            assert answer.status == 400 and "instances" in answer.json["message"], answer.body


def test_kservev2_envelope_answers_tensors_with_their_names(tmp_path: Path) -> None:
    with serving(tmp_path, "kservev2") as server:
        inputs = [{"name": "x", "shape": [3], "datatype": "INT64", "data": [1, 2, 3]}]
        answer = ask(server, {"id": "7", "inputs": inputs}, "/v2/models/double/infer")
        assert answer.status == 200, answer.body
        assert list(answer.json) == ["id", "model_name", "model_version", "outputs"]
        assert (answer.json["id"], answer.json["model_name"], answer.json["model_version"]) == ("7", "double", "1.0")
        assert answer.json["outputs"] == [{"name": "x", "datatype": "INT64", "data": [2, 4, 6], "shape": [3]}]
        answer = ask(server, {"inputs": [{"name": "x", "shape": [5], "datatype": "INT64", "data": [1]}]})
        assert answer.status == 400 and "input tensor" in answer.json["message"], answer.body
