"""gRPC's ports: who gets them, who may call, and how they end; health and reflection."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from pyserve.server import pid_file
from tests.support import certificates, serving_models
from tests.support.grpc_calls import MANAGING, PREDICTIONS, Stub, refused, stub
from tests.support.grpc_echo import ECHO, order, wait_until_there
from tests.support.handler_archives import write_handler
from tests.support.ports import free_port
from tests.support.serving import LIMIT_S, ROOT, Server

pytestmark = pytest.mark.server

Code = grpc.StatusCode
Status = health_pb2.HealthCheckResponse
OPEN_INFERENCE = ["inference.GRPCInferenceService", "org.pytorch.serve.grpc.openinference.GRPCInferenceService"]
HEALTH, REFLECTION = "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("grpc-server"))
    serving_models.write_linear(server.store)
    write_handler(server.store, "echo", ECHO)
    with server:
        server.start("--grpc", "true", "--models", "linear.mar", "echo.mar")
        yield server


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    """Not started yet."""
    server = Server(tmp_path)
    serving_models.write_linear(server.store)
    with server:
        yield server


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


# --- health and reflection --------------------------------------------------------------------------------------------


def test_health_is_that_of_the_server_and_of_each_model(server: Server) -> None:
    with grpc.insecure_channel(server.grpc()) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check

        def status(name: str) -> int:
            return int(check(health_pb2.HealthCheckRequest(service=name), timeout=LIMIT_S).status)

        for name in ("", PREDICTIONS, "linear", "echo/1.0"):
            assert status(name) == Status.SERVING, name
        error = refused(lambda: status("none"))
        assert error.code() == Code.NOT_FOUND
        server.manage("PUT", "/models/linear?min_worker=0&synchronous=true")
        try:
            assert status("linear") == Status.NOT_SERVING and status("echo") == Status.SERVING
        finally:
            server.manage("PUT", "/models/linear?min_worker=1&synchronous=true")


def test_health_can_be_watched(server: Server) -> None:
    with grpc.insecure_channel(server.grpc()) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch
        seen = watch(health_pb2.HealthCheckRequest(service="linear"), timeout=LIMIT_S)
        assert next(seen).status == Status.SERVING
        server.manage("PUT", "/models/linear?min_worker=0&synchronous=true")
        assert next(seen).status == Status.NOT_SERVING
        server.manage("PUT", "/models/linear?min_worker=1&synchronous=true")
        assert next(seen).status == Status.SERVING
        seen.cancel()
        unknown = watch(health_pb2.HealthCheckRequest(service="none"), timeout=LIMIT_S)
        assert next(unknown).status == Status.SERVICE_UNKNOWN


def test_clients_that_stop_watching_at_once_leave_the_server_running(server: Server) -> None:
    """Their calls are noted after they have ended, when grpc knows nothing about them any more."""
    before = server.process.pid
    for number in range(400):
        with grpc.insecure_channel(server.grpc()) as channel:
            asked = health_pb2.HealthCheckRequest(service="linear" if number % 2 else "none")
            seen = health_pb2_grpc.HealthStub(channel).Watch(asked, timeout=LIMIT_S)
            next(seen)
            if number % 3:
                seen.cancel()
    assert server.process.pid == before


def test_reflection_tells_services_and_messages(server: Server) -> None:
    with grpc.insecure_channel(server.grpc()) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        names = set(database.get_services())
        assert names == {PREDICTIONS, *OPEN_INFERENCE, HEALTH, REFLECTION}
        for name in names:
            assert database.FindFileContainingSymbol(name).service
    with grpc.insecure_channel(server.grpc("management")) as channel:
        found = set(ProtoReflectionDescriptorDatabase(channel).get_services())
        assert found == {MANAGING, *OPEN_INFERENCE, HEALTH, REFLECTION}


# --- ports ------------------------------------------------------------------------------------------------------------


def test_the_ports_are_shown(server: Server) -> None:
    shown = server.run("status").stdout
    for name in ("grpc_inference", "grpc_management"):
        assert f"{name:<15}  {server.running.addresses[name]}" in shown


def test_a_port_that_is_taken_is_said_and_the_rest_starts(own: Server, taken: int) -> None:
    started = own.start("--grpc", "auto", "--grpc-inference-port", str(taken), "--grpc-management-port", "0",
                        "--models", "linear.mar")  # fmt: skip
    assert f"pyserve: warning: gRPC inference: cannot listen on 127.0.0.1:{taken}" in started.stderr
    assert f"(pid {os.getpid()})" in started.stderr and "grpc_inference_port" in started.stderr
    assert "grpc_inference" not in own.running.addresses
    assert own.predict("linear", [1, 2, 3, 4]).status == 200
    with stub(own, MANAGING) as client:
        assert json.loads(client.ListModels().msg)["models"]


def test_a_port_that_is_taken_is_an_error_if_grpc_was_asked_for(own: Server, taken: int) -> None:
    failed = own.run("start", "--grpc", "true", "--grpc-inference-port", str(taken), "--grpc-management-port", "0",
                     "--models", "linear.mar")  # fmt: skip
    assert failed.returncode == 1 and f"cannot listen on 127.0.0.1:{taken}" in failed.stderr
    assert pid_file.read(own.pid_path) is None


@pytest.mark.parametrize("whether", ["true", "auto"])
def test_without_grpcio(own: Server, whether: str) -> None:
    """A package of that name that cannot be imported stands in for one that is missing."""
    (own.folder / "grpc").mkdir()
    (own.folder / "grpc/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'grpc'\", name='grpc')")
    own.environment["PYTHONPATH"] = f"{own.folder}:{ROOT}"
    started = own.run("start", "--grpc", whether, "--models", "linear.mar")
    if whether == "true":
        assert (
            started.returncode == 1 and "pip install grpcio grpcio-health-checking grpcio-reflection" in started.stderr
        )
    else:
        assert started.returncode == 0 and "gRPC" not in started.stdout + started.stderr
        assert own.predict("linear", [1, 2, 3, 4]).status == 200


def test_nothing_of_grpc_is_imported_when_it_is_off() -> None:
    program = ("import asyncio, sys; from pyserve.grpc_api.front_end import GrpcFrontEnd; "
               "from pyserve.config.config import Config; "
               "asyncio.run(GrpcFrontEnd(Config(enable_grpc='false'), 0).bind()); "
               "assert not {'grpc', 'google.protobuf'} & set(sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=LIMIT_S)


def test_one_port_for_both(own: Server) -> None:
    port = str(free_port())
    own.start("--grpc", "true", "--grpc-inference-port", port, "--grpc-management-port", port, "--models", "linear.mar")
    with stub(own) as client, stub(own, MANAGING) as manager:
        assert client.Ping().health and manager.ListModels().msg
    assert own.grpc("inference") == own.grpc("management")


def test_a_server_that_takes_anothers_place_has_the_same_ports(own: Server) -> None:
    own.start("--grpc", "true", "--models", "linear.mar")
    before = own.grpc()
    own.kill_server_process()
    with stub(own) as client:
        call, request = client.method("Ping")
        assert call(request(), wait_for_ready=True, timeout=LIMIT_S).health
    own.wait_for(lambda: own.grpc() == before, "the address in the pid file")


# --- who may call -----------------------------------------------------------------------------------------------------


def test_tokens(own: Server) -> None:
    (own.folder / "config.properties").write_text("disable_token_authorization=false\n")
    own.start("--grpc", "true", "--models", "linear.mar")
    keys = json.loads((own.folder / "key_file.json").read_text())

    def bearer(name: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {keys[name]['key']}"),)

    with stub(own) as client, stub(own, MANAGING) as manager:
        for metadata in (None, bearer("management"), (("authorization", "Bearer none"),)):
            error = refused(client.Predictions, model_name="linear", metadata=metadata)
            assert error.code() == Code.PERMISSION_DENIED
            assert error.details().startswith("Token Authorization failed. Token either incorrect, expired, or not")
        assert refused(manager.ListModels, metadata=bearer("inference")).code() == Code.PERMISSION_DENIED
        assert manager.ListModels(metadata=bearer("management")).msg
        error = refused(client.Predictions, model_name="linear", metadata=bearer("inference"))
        assert error.code() == Code.INVALID_ARGUMENT  # let through
        error = refused(client.StreamPredictions, model_name="linear")
        assert error.code() == Code.PERMISSION_DENIED
        call, request = client.method("StreamPredictions2")
        assert refused(lambda: list(call(iter([request()]), timeout=LIMIT_S))).code() == Code.PERMISSION_DENIED
        assert client.Ping().health
    with grpc.insecure_channel(own.grpc()) as channel:
        assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)


def test_tls(own: Server) -> None:
    pair = certificates.self_signed(own.folder)
    (own.folder / "config.properties").write_text(
        f"enable_grpc_ssl=true\nprivate_key_file={pair.key}\ncertificate_file={pair.certificate}\n"
    )
    own.start("--grpc", "true", "--models", "linear.mar")
    with stub(own) as plain:
        assert refused(plain.Ping, timeout=5).code() in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)

    def ping(certificate: bytes) -> bytes:
        with grpc.secure_channel(own.grpc(), grpc.ssl_channel_credentials(certificate)) as channel:
            answer: bytes = channel.unary_unary(f"/{PREDICTIONS}/Ping")(b"", timeout=LIMIT_S)
            return answer

    first = pair.certificate.read_bytes()
    assert b"Healthy" in ping(first)
    certificates.self_signed(own.folder)  # renewed: who connects from now on sees it
    renewed = pair.certificate.read_bytes()
    assert renewed != first and b"Healthy" in ping(renewed)


def test_the_model_api_is_off_where_strangers_reach_grpc(own: Server) -> None:
    (own.folder / "config.properties").write_text("grpc_management_address=0.0.0.0\ndisable_token_authorization=true\n")
    own.start("--grpc", "true", "--models", "linear.mar")
    with Stub(own.grpc("management").replace("0.0.0.0", "127.0.0.1"), MANAGING) as manager:
        error = refused(manager.UnregisterModel, model_name="linear")
        assert error.code() == Code.PERMISSION_DENIED and error.details().startswith("Model API disabled")
        assert refused(manager.RegisterModel, url="linear.mar").code() == Code.PERMISSION_DENIED
        assert manager.ListModels().msg


# --- the end ----------------------------------------------------------------------------------------------------------


def test_what_was_taken_is_answered_before_the_server_stops(own: Server, tmp_path: Path) -> None:
    write_handler(own.store, "echo", ECHO)
    own.environment["PYSERVE_DRAIN_DELAY_S"] = "2"
    own.start("--grpc", "true", "--models", "echo.mar")
    running, end = tmp_path / "running", tmp_path / "end"
    with stub(own) as client, grpc.insecure_channel(own.grpc()) as channel:
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)
        assert next(watched).status == Status.SERVING
        call, request = client.method("Predictions")
        held = call.future(
            request(model_name="echo", input=order(running=str(running), until=str(end))), timeout=LIMIT_S
        )
        wait_until_there(running)
        stopping = threading.Thread(target=own.run, args=("stop",))
        stopping.start()
        assert next(watched).status == Status.NOT_SERVING
        late = call.future(request(model_name="echo", input=order()), timeout=LIMIT_S)  # all is answered for a while
        assert [each.status for each in watched] == []  # that while is over
        assert refused(client.Predictions, model_name="echo").code() == Code.UNAVAILABLE
        end.touch()
        for answer in (held, late):
            assert json.loads(answer.result().prediction)["order"][0] == "bytearray"
        stopping.join(LIMIT_S)
        assert not stopping.is_alive()
    assert pid_file.read(own.pid_path) is None


def test_a_stream_of_requests_ends_when_the_server_stops(own: Server) -> None:
    own.start("--grpc", "true", "--models", "linear.mar")
    gate = threading.Event()
    with stub(own) as client:
        call, request = client.method("StreamPredictions2")

        def requests() -> Iterator[object]:
            yield request(model_name="linear", sequence_id="s", input={"data": b"\0" * 16})
            gate.wait(LIMIT_S)

        answers = call(requests(), timeout=LIMIT_S)
        assert len(next(answers).prediction) == 12
        assert own.run("stop").returncode == 0
        assert refused(lambda: list(answers)).code() == Code.UNAVAILABLE
        gate.set()


JAVA = "org.pytorch.serve."
NO_MODEL = f"{JAVA}archive.model.ModelNotFoundException"
NO_URL = f"Parameter url is required.\n{JAVA}http.BadRequestException"
REGISTERED = 'Model "linear" Version: 1.0 registered with 0 initial workers. ' + (
    "Use scale workers API to add workers for the model."
)


def strict_management_calls() -> Iterator[tuple[str, dict[str, Any], Any, str]]:
    """Method, fields, code and text; one after the other, as TorchServe was measured to answer them."""
    yield "DescribeModel", {}, Code.NOT_FOUND, f"Model not found: \n{NO_MODEL}"
    yield "SetDefault", {"model_name": "none"}, Code.NOT_FOUND, f"Model not found: none\n{NO_MODEL}"
    yield "UnregisterModel", {}, Code.INVALID_ARGUMENT, NO_URL
    yield "RegisterModel", {}, Code.INVALID_ARGUMENT, NO_URL
    url = "http://127.0.0.1:1/x.mar"
    failed = f"Failed to download archive from: {url}\n{JAVA}archive.DownloadArchiveException"
    yield "RegisterModel", {"url": url}, Code.INVALID_ARGUMENT, failed
    exists = f"Model file already exists linear.mar\n{JAVA}http.InternalServerException"
    yield "RegisterModel", {"url": "file:///nowhere/linear.mar"}, Code.INTERNAL, exists
    # Numbers that are not above 0 mean the default here.
    yield "RegisterModel", {"url": "linear.mar", "batch_size": -1, "initial_workers": -5}, Code.OK, REGISTERED
    yield "RegisterModel", {"url": "linear.mar"}, Code.UNKNOWN, ""
    nobody = f"InternalServerException.()\n{JAVA}http.InternalServerException"
    yield "DescribeModel", {"model_name": "linear", "customized": True}, Code.INTERNAL, nobody
    # Numbers of workers below 0 are the errors that they are over HTTP; in TorchServe they count as not given.
    out_of_bounds = "Index -1 out of bounds for length 0\nIndexOutOfBoundsException"
    yield "ScaleWorker", {"model_name": "linear", "min_worker": -1}, Code.INTERNAL, out_of_bounds
    too_few = f"max_worker cannot be less than min_worker.\n{JAVA}http.BadRequestException"
    yield "ScaleWorker", {"model_name": "linear", "max_worker": -1}, Code.INVALID_ARGUMENT, too_few
    yield "UnregisterModel", {"model_name": "linear"}, Code.OK, 'Model "linear" unregistered'


def test_strict_management_answers_as_torchserve_does(own: Server) -> None:
    (own.folder / "config.properties").write_text(
        "compat=strict\ndisable_token_authorization=true\nenable_model_api=true\n"
    )
    own.start("--grpc", "true")
    with Stub(own.grpc("management"), MANAGING) as client:
        assert json.loads(client.ListModels().msg) == {"nextPageToken": "0", "models": []}
        for method, fields, code, text in strict_management_calls():
            try:
                told = (Code.OK, getattr(client, method)(**fields).msg)
            except grpc.RpcError as error:
                told = (error.code(), error.details())
            assert told == (code, text), (method, fields)


def test_strict_errors_and_the_age_of_connections(own: Server) -> None:
    (own.folder / "config.properties").write_text(
        "compat=strict\ndisable_token_authorization=true\n"
        "grpc_inference_max_connection_age_ms=100\ngrpc_inference_max_connection_age_grace_ms=100\n"
    )
    own.start("--grpc", "true", "--models", "linear.mar")
    with stub(own) as client:
        assert refused(client.Predictions, model_name="none").details().split("\n") == [
            "Model not found: none", "org.pytorch.serve.archive.model.ModelNotFoundException",
        ]  # fmt: skip
    host, _, port = own.grpc().rpartition(":")
    with socket.create_connection((host, int(port)), timeout=LIMIT_S) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        while connection.recv(4096):
            pass  # until the server closes it
