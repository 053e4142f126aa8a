"""Triton's model repository and model configuration, as Triton's own clients ask for them over HTTP and gRPC."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpc_triton
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from pyserve.config.config import load_config
from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, Server, at_once
from tests.support.serving_models import LINEAR_INPUT, Linear, write_linear, write_pictures, write_torchscript

pytestmark = pytest.mark.server

OWN = """
def handle(data, context):
    return None if data is None else ["own"] * len(data)
"""
BROKEN = "raise RuntimeError('cannot be imported')\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("control"))
    store = server.store
    write_linear(store)
    write_torchscript(
        store, Linear(), "batched",
        config={"input": LINEAR_INPUT, "batchSize": 4, "maxBatchDelay": 20, "output": "scores", "minWorkers": 2,
                "maxWorkers": 2},
    )  # fmt: skip
    write_pictures(store)
    write_handler(store, "own", OWN)
    write_handler(store, "sequences", OWN, config={"sequenceBatching": True, "sequenceMaxIdleMSec": 5000})
    write_handler(store, "broken", BROKEN)
    outside = tmp_path_factory.mktemp("outside")
    write_handler(outside, "elsewhere", OWN)
    models = f"linear.mar,batched.mar,pictures.mar,own.mar,sequences.mar,{outside / 'elsewhere.mar'}"
    with server:
        server.start("--grpc", "true", "--models", models)
        yield server


@pytest.fixture
def manager(server: Server) -> Iterator[Any]:
    """Of the management port."""
    with triton.InferenceServerClient("{}:{}".format(*server.address("management"))) as client:
        yield client


@pytest.fixture
def grpc_manager(server: Server) -> Iterator[Any]:
    with grpc_triton.InferenceServerClient(server.grpc("management")) as client:
        yield client


def states(client: Any) -> dict[str, str]:
    told = client.get_model_repository_index()
    rows = told if isinstance(told, list) else [{"name": row.name, "state": row.state} for row in told.models]
    return {row["name"]: row["state"] for row in rows}


# --- configuration ----------------------------------------------------------------------------------------------------


def test_the_configuration_says_what_the_server_does(server: Server, manager: Any) -> None:
    with triton.InferenceServerClient("{}:{}".format(*server.address())) as client:
        told = client.get_model_config("batched")
        assert told == client.get_model_config("batched", "1.0") == manager.get_model_config("batched")
        assert (told["name"], told["max_batch_size"], told["backend"]) == ("batched", 4, "pytorch")
        (given,), (output,) = told["input"], told["output"]
        assert (given["name"], given["data_type"], given["dims"]) == ("input0", "TYPE_FP32", [4])
        assert (output["name"], output["data_type"], output["dims"]) == ("scores", "TYPE_FP32", [3])
        assert told["dynamic_batching"]["max_queue_delay_microseconds"] == 20_000
        assert told["instance_group"] == [{"name": "batched", "kind": "KIND_CPU", "count": 2, "gpus": []}]
        assert told["model_transaction_policy"] == {"decoupled": False}
        assert client.get_model_config("linear")["max_batch_size"] == 1
        (picture,) = client.get_model_config("pictures")["input"]
        assert (picture["data_type"], picture["dims"], picture["reshape"]) == ("TYPE_STRING", [1], {"shape": []})
        own = client.get_model_config("own")
        assert (own["max_batch_size"], own["input"], own["backend"]) == (0, [], "python")
        batching = client.get_model_config("sequences")["sequence_batching"]
        assert batching["max_sequence_idle_microseconds"] == 5_000_000
        for arguments in (("none",), ("linear", "9")):
            with pytest.raises(InferenceServerException, match=r"none|9"):
                client.get_model_config(*arguments)


def test_sizes_that_the_configuration_names_are_taken(server: Server) -> None:
    with triton.InferenceServerClient("{}:{}".format(*server.address())) as client:
        told = client.get_model_config("batched")
        (row,) = told["input"]
        given = triton.InferInput(row["name"], [told["max_batch_size"], *row["dims"]], row["data_type"][5:])
        given.set_data_from_numpy(np.zeros((told["max_batch_size"], *row["dims"]), np.float32))
        answer = client.infer("batched", [given])
        assert answer.as_numpy("scores").shape == (told["max_batch_size"], *told["output"][0]["dims"])


def test_grpc_has_the_same_configuration(server: Server, manager: Any) -> None:
    for name in ("inference", "management"):
        with grpc_triton.InferenceServerClient(server.grpc(name)) as client:
            for model in ("batched", "pictures", "own", "sequences"):
                told = client.get_model_config(model, as_json=True)["config"]
                expected = manager.get_model_config(model)
                assert told["name"] == model and told.get("max_batch_size", 0) == expected["max_batch_size"]
                assert [each["dims"] for each in told.get("input", [])] == [
                    [str(size) for size in each["dims"]] for each in expected["input"]
                ]
                assert ("sequence_batching" in told) == ("sequence_batching" in expected)
            with pytest.raises(InferenceServerException, match="Model not found: none"):
                client.get_model_config("none")


# --- loading and unloading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_a_model_is_unloaded_and_loaded_again(server: Server, manager: Any, grpc_manager: Any, kind: str) -> None:
    client = manager if kind == "http" else grpc_manager
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("linear")
    client.unload_model("linear", unload_dependents=True)
    assert not manager.is_model_ready("linear") and server.predict("linear", [1, 2, 3, 4]).status == 404
    assert states(client)["linear"] == "UNAVAILABLE"
    client.load_model("linear")
    assert client.is_model_ready("linear") and states(client)["linear"] == "READY"
    assert server.predict("linear", [1, 2, 3, 4]).status == 200
    client.load_model("linear")  # which changes nothing
    assert [row["modelVersion"] for row in server.manage("GET", "/models/linear/all")] == ["1.0"]


def test_the_index_shows_who_may_load_what_could_be_loaded(server: Server, manager: Any, grpc_manager: Any) -> None:
    for client in (manager, grpc_manager):
        assert states(client)["broken"] == "UNAVAILABLE" and states(client)["own"] == "READY"
    ready = server.ask("POST", "/v2/repository/index", b'{"ready": true}', JSON, port="management").json
    assert "own" in [row["name"] for row in ready] and "broken" not in [row["name"] for row in ready]
    with triton.InferenceServerClient("{}:{}".format(*server.address())) as client:
        assert "own" in states(client) and "broken" not in states(client)
    with grpc_triton.InferenceServerClient(server.grpc()) as client:
        assert "own" in states(client) and "broken" not in states(client)


def test_a_model_without_workers_gets_one(server: Server, manager: Any) -> None:
    server.manage("PUT", "/models/own?min_worker=0&synchronous=true")
    assert not manager.is_model_ready("own")
    manager.load_model("own")
    assert manager.is_model_ready("own")


def test_a_new_version_in_the_store_becomes_the_default_beside_the_old_one(server: Server, manager: Any) -> None:
    write_handler(server.store, "versions", OWN)
    manager.load_model("versions")
    write_handler(server.store, "versions", OWN.replace('"own"', '"new"'), version="2.0")
    manager.load_model("versions")
    versions = {row["modelVersion"] for row in server.manage("GET", "/models/versions/all")}
    assert versions == {"1.0", "2.0"} and server.predict("versions", 1).body == b"new"
    write_handler(server.store, "versions", OWN.replace('"own"', '"other"'), version="2.0")
    with pytest.raises(InferenceServerException, match=r"has changed since version 2\.0") as caught:
        manager.load_model("versions")
    assert caught.value.status() == "409" and server.predict("versions", 1).body == b"new"
    manager.unload_model("versions")
    assert server.predict("versions", 1).status == 404
    manager.load_model("versions")
    assert server.predict("versions", 1).body == b"other"
    assert server.ask("GET", "/v2/models/versions").json["versions"] == ["2.0"]
    manager.unload_model("versions")
    (server.store / "versions.mar").unlink()


def test_what_was_loaded_from_a_file_of_another_name_is_found_again(server: Server, manager: Any) -> None:
    server.manage("POST", "/models?url=own.mar&model_name=alias&initial_workers=1")
    manager.unload_model("alias")
    assert states(manager)["alias"] == "UNAVAILABLE"
    manager.load_model("alias")
    assert server.predict("alias", 1).body == b"own"
    manager.unload_model("alias")


def test_what_was_loaded_from_outside_of_the_store_is_not_promised_again(server: Server, manager: Any) -> None:
    assert server.predict("elsewhere", 1).body == b"own"
    manager.unload_model("elsewhere")
    assert "elsewhere" not in states(manager)
    with pytest.raises(InferenceServerException, match="the model store has no archive or folder of that name"):
        manager.load_model("elsewhere")


def test_calls_about_one_model_come_one_after_the_other(server: Server) -> None:
    def load() -> int:
        return server.ask("POST", "/v2/repository/models/own/load", port="management").status

    def unload() -> int:
        return server.ask("POST", "/v2/repository/models/own/unload", port="management").status

    statuses = at_once([load, unload, load, unload, load])
    assert set(statuses) <= {200, 404}
    assert load() == 200 and server.predict("own", 1).status == 200


# --- what is refused --------------------------------------------------------------------------------------------------


def test_bad_calls_are_refused_by_name_and_change_nothing(server: Server, manager: Any, grpc_manager: Any) -> None:
    config = json.dumps({"max_batch_size": 8})
    for client in (manager, grpc_manager):
        for call, word in (
            (lambda client=client: client.load_model("none"), "Model not found: none"),
            (lambda client=client: client.load_model("../own"), "not found"),
            (lambda client=client: client.load_model("broken"), "broken"),
            (lambda client=client: client.load_model("own", config=config), '"config" of loading model "own"'),
            (
                lambda client=client: client.load_model("own", config=config, files={"file:1/model.pt": b"x"}),
                '"config" of loading|"file:1/model.pt" of loading',
            ),
            (lambda client=client: client.unload_model("none"), "Model not found: none"),
        ):
            with pytest.raises(InferenceServerException, match=word):
                call()
    assert manager.is_model_ready("own") and not manager.is_model_ready("broken")
    assert states(manager)["broken"] == "UNAVAILABLE"


@pytest.mark.parametrize("body", [
    b"x", b"[]", b'{"parameters": 1}', b'{"other": {}}', b'{"parameters": {"x": 1}}',
    b'{"parameters": {"unload_dependents": "yes"}}', b'{"parameters": {"config": "' + b"x" * 70_000 + b'"}}',
])  # fmt: skip
@pytest.mark.parametrize("verb", ["load", "unload"])
def test_bodies_that_say_something_else_are_refused(server: Server, verb: str, body: bytes) -> None:
    answer = server.ask("POST", f"/v2/repository/models/own/{verb}", body, JSON, port="management")
    assert answer.status == 400 and answer.json["error"], answer.body
    assert server.predict("own", 1).status == 200


def test_two_archives_of_one_name_are_not_guessed_among(server: Server, manager: Any) -> None:
    write_handler(server.store, "twice", OWN)
    shutil.copy(server.store / "twice.mar", server.store / "twice.model")
    try:
        with pytest.raises(InferenceServerException, match=r'"twice\.mar" and "twice\.model"|"twice\.model" and'):
            manager.load_model("twice")
    finally:
        for suffix in (".mar", ".model"):
            (server.store / f"twice{suffix}").unlink()


def test_the_inference_ports_refuse_and_name_the_other_one(server: Server) -> None:
    clients: list[Any] = [
        triton.InferenceServerClient("{}:{}".format(*server.address())),
        grpc_triton.InferenceServerClient(server.grpc()),
    ]
    for client in clients:
        with client:
            for call in (client.load_model, client.unload_model):
                with pytest.raises(InferenceServerException, match=r"management port, .*model_control_on_inference"):
                    call("own")
            assert client.is_model_ready("own")


def test_a_web_page_cannot_unload(server: Server) -> None:
    for headers in ({"Origin": "https://elsewhere.example"}, {"Host": "elsewhere.example"}):
        answer = server.ask("POST", "/v2/repository/models/own/unload", b"", headers, port="management")
        assert answer.status == 403
    assert server.predict("own", 1).status == 200


def test_the_management_grpc_port_runs_no_model(grpc_manager: Any) -> None:
    given = grpc_triton.InferInput("input0", [1, 4], "FP32")
    given.set_data_from_numpy(np.zeros((1, 4), np.float32))
    with pytest.raises(InferenceServerException) as caught:
        grpc_manager.infer("linear", [given])
    assert caught.value.status() == str(grpc.StatusCode.UNIMPLEMENTED)


# --- keys, and the inference ports ------------------------------------------------------------------------------------


def test_on_the_inference_ports_it_takes_the_management_key(tmp_path: Any) -> None:
    server = Server(tmp_path)
    write_handler(server.store, "own", OWN)
    write_handler(server.store, "absent", OWN)
    (tmp_path / "config.properties").write_text(
        "model_control_on_inference=true\ndisable_token_authorization=false\nenable_grpc=true\n"
    )
    with server:
        server.start("--grpc", "true", "--models", "own.mar")
        unload = "/v2/repository/models/own/unload"
        for headers, status in (({}, 401), (server.key("inference"), 401), (server.key("management"), 200)):
            assert server.ask("POST", unload, b"", headers).status == status, headers
        assert server.ask("POST", unload, b"", {**server.key(), "Origin": "https://x.example"}).status == 403
        for port, scope, sees_store in (("inference", "inference", False), ("management", "management", True)):
            told = server.ask("POST", "/v2/repository/index", b"", server.key(scope), port=port).json
            assert ("absent" in [row["name"] for row in told]) == sees_store
            with grpc_triton.InferenceServerClient(server.grpc(port)) as client:
                key = {name.lower(): value for name, value in server.key(scope).items()}
                rows = client.get_model_repository_index(headers=key).models
                assert ("absent" in [row.name for row in rows]) == sees_store
        with grpc_triton.InferenceServerClient(server.grpc()) as client:
            for scope in ("", "inference"):
                headers = {key.lower(): value for key, value in server.key(scope).items()} if scope else {}
                with pytest.raises(InferenceServerException) as caught:
                    client.load_model("own", headers=headers)
                assert caught.value.status() == str(grpc.StatusCode.PERMISSION_DENIED)
            client.load_model("own", headers={key.lower(): value for key, value in server.key().items()})
        assert server.ask("GET", "/v2/models/own/ready", headers=server.key("inference")).status == 200


def test_switched_on_for_all_the_world_it_needs_keys_and_the_model_api(tmp_path: Any) -> None:
    def config(text: str) -> Any:
        path = tmp_path / "config.properties"
        path.write_text(f"model_store={tmp_path}\ninference_address=http://0.0.0.0:8080\n{text}")
        return load_config(ts_config=str(path), environ={})

    assert config("").management_is_local and config("").allows_model_api
    opened = config("model_control_on_inference=true")
    assert not opened.management_is_local and not opened.allows_model_api
    assert config("model_control_on_inference=true\nenable_model_api=true").allows_model_api
