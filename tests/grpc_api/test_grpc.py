"""TorchServe's gRPC services over real channels: answers, errors and their codes, limits, streams and sequences."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from tests.support import serving_models
from tests.support.grpc_calls import MANAGING, PREDICTIONS, Stub, refused, stub
from tests.support.grpc_echo import ECHO, order, wait_until_there
from tests.support.handler_archives import write_handler
from tests.support.sequence_adder import ADDER
from tests.support.serving import LIMIT_S, Server

pytestmark = pytest.mark.server

Code = grpc.StatusCode
REQUEST_SIZE_MAX = 100_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("grpc"))
    serving_models.write_linear(server.store)
    serving_models.write_pictures(server.store)
    write_handler(server.store, "echo", ECHO)
    write_handler(server.store, "tiny", ECHO, config={"jobQueueSize": 1})
    sequences = {"sequenceBatching": True, "batchSize": 4, "maxNumSequence": 100, "sequenceMaxIdleMSec": 600_000,
                 "maxSequenceJobQueueSize": 100}  # fmt: skip
    adder = "import json\n" + ADDER.replace('order = row["body"]', 'order = json.loads(row["data"])')
    write_handler(server.store, "adder", adder, config=sequences)
    (server.folder / "config.properties").write_text(f"max_request_size={REQUEST_SIZE_MAX}\n")
    with server:
        server.start("--grpc", "true", "--models", "linear.mar", "pictures.mar", "echo.mar", "tiny.mar", "adder.mar")
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Stub]:
    with stub(server) as made:
        yield made


def numbers(*values: float) -> bytes:
    return torch.tensor(values, dtype=torch.float32).numpy().tobytes()


def test_ping(client: Stub) -> None:
    assert client.Ping().health == '{\n  "status": "Healthy"\n}'


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["data", "body"])
def test_a_built_in_handler_takes_bytes_under_the_usual_names(client: Stub, key: str) -> None:
    answer = client.Predictions(model_name="linear", input={key: numbers(1, 2, 3, 4)})
    got = torch.frombuffer(bytearray(answer.prediction), dtype=torch.float32)
    expected = serving_models.Linear()(torch.tensor([[1.0, 2, 3, 4]]))[0]
    assert torch.allclose(got, expected, rtol=1e-5)
    assert not answer.HasField("sequence_id") and not answer.HasField("status")


UNTYPED = {"content-type": ""}  # the entry of an input among the headers, as measured on TorchServe


def test_a_handler_gets_bytearrays_under_the_clients_names_and_no_headers(client: Stub) -> None:
    row = {"data": b"one", "b \u00e9&=": b'{"json": 1}', "": b"", "body": b"x" * 3000}
    answer = json.loads(client.Predictions(model_name="echo", model_version="1.0", input=row).prediction)
    assert answer.pop("headers") == dict.fromkeys(row, UNTYPED)
    assert answer == {key: ["bytearray", value.decode()[:100]] for key, value in row.items()}


def test_a_request_without_inputs_is_an_empty_row(client: Stub) -> None:
    assert json.loads(client.Predictions(model_name="echo").prediction) == {"headers": {}}


def test_of_the_metadata_the_trace_reaches_the_handler_and_the_id_comes_back(client: Stub) -> None:
    call, request = client.method("Predictions")
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    metadata = (("traceparent", trace), ("x-request-id", "mine-1"), ("x-other", "no"))
    answer, ended = call.with_call(request(model_name="echo"), metadata=metadata, timeout=LIMIT_S)
    assert json.loads(answer.prediction)["headers"] == {"traceparent": trace}
    assert dict(ended.trailing_metadata())["x-request-id"] == "mine-1"


def test_the_stages_of_an_answer_are_told_if_the_client_asks(client: Stub) -> None:
    call, request = client.method("Predictions")
    for model in ("linear", "echo"):
        asked = request(model_name=model, input={"data": numbers(0, 0, 0, 0)})
        _, ended = call.with_call(asked, metadata=(("x-server-timing", "1"),), timeout=LIMIT_S)
        told = dict(ended.trailing_metadata())["server-timing"]
        assert "queue;dur=" in told and "total;dur=" in told
        _, ended = call.with_call(asked, timeout=LIMIT_S)
        assert "server-timing" not in dict(ended.trailing_metadata())
    error = refused(client.Predictions, model_name="linear", metadata=(("x-request-timeout-ms", "soon"),))
    assert error.code() == Code.INVALID_ARGUMENT and "x-request-timeout-ms" in error.details()


@pytest.mark.parametrize(("model", "inputs", "code", "first", "second"), [
    ("", {}, Code.INTERNAL, "Parameter model_name is required.", "BadRequestException.()"),
    ("none", {}, Code.INTERNAL, "Model not found: none", "org.pytorch.serve.archive.model.ModelNotFoundException"),
    ("echo", order(error="mine"), Code.UNAVAILABLE, "Prediction failed",
     "org.pytorch.serve.http.InternalServerException"),
    ("pictures", {"data": b"no picture"}, Code.INVALID_ARGUMENT, None, "BadRequestException.()"),
    ("linear", {"data": b"123"}, Code.INVALID_ARGUMENT, None, "BadRequestException.()"),
    ("linear", {"other": b"123"}, Code.INVALID_ARGUMENT, None, "BadRequestException.()"),
    ("echo", {str(each): b"" for each in range(1001)}, Code.RESOURCE_EXHAUSTED, None, "BadRequestException.()"),
])  # fmt: skip
def test_errors_have_torchserves_codes_and_texts(  # noqa: PLR0917
    client: Stub, model: str, inputs: dict[str, bytes], code: grpc.StatusCode, first: str | None, second: str
) -> None:
    error = refused(client.Predictions, model_name=model, input=inputs)
    lines = error.details().split("\n")
    assert error.code() == code and lines[1] == second, lines
    assert first is None or lines[0] == first
    assert json.loads(lines[2])["request_id"] == dict(error.trailing_metadata())["x-request-id"]


def test_an_unknown_version_is_named(client: Stub) -> None:
    error = refused(client.Predictions, model_name="echo", model_version="9")
    assert error.code() == Code.INTERNAL
    assert error.details().split("\n")[:2] == [
        "Model version: 9 does not exist for model: echo",
        "org.pytorch.serve.archive.model.ModelVersionNotFoundException",
    ]


@pytest.mark.parametrize(("status", "code"), [
    (400, Code.INVALID_ARGUMENT), (401, Code.UNAUTHENTICATED), (403, Code.PERMISSION_DENIED), (404, Code.NOT_FOUND),
    (409, Code.ABORTED), (413, Code.RESOURCE_EXHAUSTED), (429, Code.RESOURCE_EXHAUSTED), (416, Code.OUT_OF_RANGE),
    (418, Code.FAILED_PRECONDITION), (499, Code.CANCELLED), (500, Code.INTERNAL), (501, Code.UNIMPLEMENTED),
    (503, Code.UNAVAILABLE), (504, Code.DEADLINE_EXCEEDED), (507, Code.INTERNAL),
])  # fmt: skip
def test_the_codes_of_handlers_errors(client: Stub, status: int, code: grpc.StatusCode) -> None:
    error = refused(client.Predictions, model_name="echo", input=order(code=status))
    assert error.code() == code
    assert error.details().split("\n")[:2] == ["as asked", "org.pytorch.serve.http.InternalServerException"]


def test_a_status_that_a_handler_sets_is_ignored(client: Stub) -> None:
    assert json.loads(client.Predictions(model_name="echo", input=order(status=418)).prediction)["headers"] == {
        "order": UNTYPED
    }


def test_a_message_that_is_none(client: Stub) -> None:
    call = client.channel.unary_unary(f"/{PREDICTIONS}/Predictions")
    error = refused(lambda: call(b"\xff\xff", timeout=LIMIT_S))
    assert error.code() == Code.INVALID_ARGUMENT and "PredictionsRequest" in error.details()


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [REQUEST_SIZE_MAX + 1, 2 * REQUEST_SIZE_MAX])
def test_a_request_over_the_limit_is_told_the_setting_and_both_sizes(client: Stub, size: int) -> None:
    error = refused(client.Predictions, model_name="echo", input={"data": b"x" * size})
    assert error.code() == Code.RESOURCE_EXHAUSTED
    assert f"max_request_size is {REQUEST_SIZE_MAX}" in error.details()


def test_a_request_far_over_the_limit_is_refused_by_grpc(client: Stub) -> None:
    error = refused(client.Predictions, model_name="echo", input={"data": bytes(4 * REQUEST_SIZE_MAX)})
    assert error.code() == Code.RESOURCE_EXHAUSTED
    assert client.Ping().health


def test_an_answer_may_be_as_large_as_over_http_and_says_what_its_client_needs(server: Server) -> None:
    size = 5 << 20
    with stub(server) as client:
        call, request = client.method("Predictions")
        answer, ended = call.with_call(request(model_name="echo", input=order(size=size)), timeout=LIMIT_S)
        assert len(answer.prediction) == size
        assert "grpc.max_receive_message_length" in dict(ended.initial_metadata())["x-pyserve-fix"]
    with stub(server, **{"grpc.max_receive_message_length": 4 << 20}) as client:
        assert refused(client.Predictions, model_name="echo", input=order(size=size)).code() == Code.RESOURCE_EXHAUSTED


def test_an_answer_over_max_response_size_is_an_error(client: Stub) -> None:
    error = refused(client.Predictions, model_name="echo", input=order(size=7_000_000))
    assert "max_response_size" in error.details()


def hold(client: Stub, folder: Path, model: str = "echo") -> tuple[Any, Path]:
    """A call whose handler runs until the file that is returned exists."""
    running, end = folder / "running", folder / "end"
    call, request = client.method("Predictions")
    held = call.future(request(model_name=model, input=order(running=str(running), until=str(end))), timeout=LIMIT_S)
    wait_until_there(running)
    return held, end


def pending(server: Server, model: str) -> int:
    return int(server.describe(model)["jobQueueStatus"]["pendingRequests"])


def test_a_full_queue_refuses_and_says_why(server: Server, client: Stub, tmp_path: Path) -> None:
    held, end = hold(client, tmp_path, "tiny")
    call, request = client.method("Predictions")
    second = call.future(request(model_name="tiny"), timeout=LIMIT_S)
    server.wait_for(lambda: pending(server, "tiny") == 1, "the second")
    error = refused(client.Predictions, model_name="tiny")
    assert error.code() == Code.INTERNAL
    first, augmented, detail = error.details().split("\n")
    assert first == 'Model "tiny" has no worker to serve inference request. ' \
                    "Please use scale workers API to add workers. If this is a sequence inference, please check " \
                    "if it is closed, or expired; or exceeds maxSequenceJobQueueSize"  # fmt: skip
    assert augmented == "InternalServerException.()" and json.loads(detail)["reason"] == "queue full"
    assert "retry-after" in dict(error.trailing_metadata())
    end.touch()
    assert held.result() and second.result()


def test_a_deadline_holds_in_the_queue_and_the_request_never_runs(server: Server, client: Stub, tmp_path: Path) -> None:
    def dropped() -> float:  # by its deadline, or by grpc's cancelling it a moment before
        aborted = server.metric("pyserve_requests_aborted_total", model="echo")
        return aborted + server.metric("pyserve_requests_rejected_total", model="echo", reason="expired")

    held, end = hold(client, tmp_path)
    ran = tmp_path / "ran"
    before = dropped()
    call, request = client.method("Predictions")
    seen = False
    for timeout_s in (0.3, 3.0, 30.0):  # a busy machine may see nothing of a request before its time is over
        late = call.future(request(model_name="echo", input=order(running=str(ran))), timeout=timeout_s)
        while not seen and not late.done():
            seen = pending(server, "echo") == 1
        assert late.code() == Code.DEADLINE_EXCEEDED
        if seen:
            break
        before = dropped()
    server.wait_for(lambda: dropped() == before + 1, "the request to be dropped")
    end.touch()
    held.result()
    client.Predictions(model_name="echo")
    assert not ran.exists()


def test_a_request_that_is_cancelled_never_runs(server: Server, client: Stub, tmp_path: Path) -> None:
    held, end = hold(client, tmp_path)
    ran = tmp_path / "ran"
    call, request = client.method("Predictions")
    future = call.future(request(model_name="echo", input=order(running=str(ran))), timeout=LIMIT_S)
    server.wait_for(lambda: pending(server, "echo") == 1, "the request to wait")
    aborted = server.metric("pyserve_requests_aborted_total", model="echo")
    future.cancel()
    server.wait_for(lambda: server.metric("pyserve_requests_aborted_total", model="echo") == aborted + 1, "the end")
    end.touch()
    held.result()
    client.Predictions(model_name="echo")
    assert not ran.exists()


def test_calls_are_counted_as_those_of_http_are(server: Server, client: Stub) -> None:
    def count(sample: str, **labels: str) -> float:
        return server.metric(sample, **labels)

    names = [("ts_inference_requests_total", {"model_name": "echo", "model_version": "default"}),
             ("pyserve_requests_total", {"model": "echo", "status": "200"}),
             ("pyserve_requests_total", {"model": "echo", "status": "503"}), ("Requests4XX_total", {})]  # fmt: skip
    before = [count(name, **labels) for name, labels in names]
    for _ in range(3):
        client.Predictions(model_name="echo")
    refused(client.Predictions, model_name="echo", input=order(error="one"))
    refused(client.Predictions, model_name="none")
    after = [count(name, **labels) for name, labels in names]
    assert [now - then for now, then in zip(after, before, strict=True)] == [4, 3, 1, 1]


# --- streams ----------------------------------------------------------------------------------------------------------


def test_parts_come_one_by_one(client: Stub) -> None:
    answers = client.StreamPredictions(model_name="echo", input=order(parts=3))
    got = [answer.prediction for answer in answers]
    assert got[:3] == [b"part 0 ", b"part 1 ", b"part 2 "] and json.loads(got[3])["headers"] == {"order": UNTYPED}


def test_a_handler_that_does_not_stream_gives_one_message(client: Stub) -> None:
    (answer,) = client.StreamPredictions(model_name="echo", input={"data": b"x"})
    assert json.loads(answer.prediction)["data"] == ["bytearray", "x"]


def test_parts_are_joined_for_a_call_that_does_not_stream(client: Stub) -> None:
    assert client.Predictions(model_name="echo", input=order(parts=2)).prediction.startswith(b"part 0 part 1 {")


def test_a_stream_that_fails_says_why_after_its_parts(client: Stub) -> None:
    got = []
    with pytest.raises(grpc.RpcError) as raised:
        for answer in client.StreamPredictions(model_name="echo", input=order(parts=2, fail_late=True)):
            got.append(answer.prediction)
    assert got == [b"part 0 ", b"part 1 "]
    assert raised.value.code() == Code.UNAVAILABLE and "too late" in raised.value.details()


def test_an_error_of_a_stream(client: Stub) -> None:
    assert refused(client.StreamPredictions, model_name="none").code() == Code.INTERNAL


def test_a_client_that_does_not_read_its_parts_is_given_up(server: Server, client: Stub, tmp_path: Path) -> None:
    """Its handler goes on sending, and nothing piles up without end."""
    stream = client.StreamPredictions(model_name="echo", input=order(parts=400, part_size=100_000))
    assert len(next(stream).prediction) == 100_000
    server.wait_for(lambda: server.metric("pyserve_requests_in_flight", model="echo") == 0, "the end of the request")
    with pytest.raises(grpc.RpcError) as raised:
        list(stream)
    assert raised.value.code() == Code.RESOURCE_EXHAUSTED and "read them faster" in raised.value.details()


def test_a_stream_that_is_cancelled_ends_at_the_server(server: Server, client: Stub, tmp_path: Path) -> None:
    running = tmp_path / "running"
    stream = client.StreamPredictions(model_name="echo", input=order(running=str(running), until=str(tmp_path / "end")))
    wait_until_there(running)
    aborted = server.metric("pyserve_requests_aborted_total", model="echo")
    stream.cancel()
    server.wait_for(lambda: server.metric("pyserve_requests_aborted_total", model="echo") == aborted + 1, "the end")
    (tmp_path / "end").touch()


# --- sequences --------------------------------------------------------------------------------------------------------


def add(id: str = "", *, start: bool = False, model: str = "adder", **members: Any) -> dict[str, Any]:
    row = {"data": json.dumps(members).encode()}
    if start:
        row["ts_request_sequence_start"] = b"true"
    return {"model_name": model, "input": row, **({"sequence_id": id} if id else {})}


def ask_all(client: Stub, *requests: dict[str, Any]) -> list[Any]:
    call, request = client.method("StreamPredictions2")
    return list(call(iter([request(**each) for each in requests]), timeout=LIMIT_S))


def test_requests_of_a_sequence_are_answered_in_order_by_one_worker(client: Stub) -> None:
    answers = ask_all(client, *[add("s1", add=number) for number in range(20)])
    told = [json.loads(answer.prediction) for answer in answers]
    assert [each["numbers"] for each in told] == [list(range(size + 1)) for size in range(20)]
    assert {answer.sequence_id for answer in answers} == {"s1"}
    assert not any(answer.HasField("status") for answer in answers)


def test_several_sequences_share_a_stream(client: Stub) -> None:
    answers = ask_all(client, *[add(f"m{number % 3}", add=number) for number in range(9)])
    last = {answer.sequence_id: json.loads(answer.prediction)["numbers"] for answer in answers}
    assert last == {"m0": [0, 3, 6], "m1": [1, 4, 7], "m2": [2, 5, 8]}


def test_the_server_makes_an_id_for_a_sequence_that_starts(client: Stub) -> None:
    first, second = ask_all(client, add(start=True, add=1), add(add=2))
    assert first.sequence_id.startswith("ts-seq-") and second.sequence_id == first.sequence_id
    told = json.loads(first.prediction)
    assert told["id"] == first.sequence_id and told["start"] == "true"
    assert json.loads(second.prediction)["numbers"] == [1, 2]


def test_a_request_without_an_id_is_not_guessed_to_be_of_one_of_several_sequences(client: Stub) -> None:
    answers = ask_all(client, add("g1", add=1), add("g2", start=True, add=2), add(add=3), add("g1", add=4), add(add=5))
    told = {answer.sequence_id: json.loads(answer.prediction)["numbers"] for answer in answers if answer.prediction}
    assert told == {"g1": [1, 4], "g2": [2, 3]}
    (status,) = [answer.status for answer in answers if not answer.prediction]
    assert status.code == 3 and "several sequences" in status.message and '"position": 4' in status.message


def test_errors_of_a_stream_of_requests_travel_beside_the_answers(client: Stub) -> None:
    answers = ask_all(client, add(add=1), add("e1", model="none"), add("e1", model=""), add("e1", add=1))
    assert [answer.status.code for answer in answers] == [3, 13, 13, 0]
    assert "sequence_id" in answers[0].status.message
    assert answers[1].status.message.startswith("Model not found: none\norg.pytorch")
    assert json.loads(answers[3].prediction)["numbers"] == [1]


def test_a_sequence_id_counts_in_the_other_calls_too(client: Stub) -> None:
    for number in range(3):
        answer = client.Predictions(**add("p1", add=number))
    assert json.loads(answer.prediction)["numbers"] == [0, 1, 2]


# --- management -------------------------------------------------------------------------------------------------------


@pytest.fixture
def manager(server: Server) -> Iterator[Stub]:
    with stub(server, MANAGING) as made:
        yield made


def test_describe_is_the_json_of_http(server: Server, manager: Stub) -> None:
    told = json.loads(manager.DescribeModel(model_name="linear").msg)
    assert told[0].keys() == server.describe("linear").keys() and told[0]["modelName"] == "linear"
    assert len(json.loads(manager.DescribeModel(model_name="linear", model_version="all").msg)) == 1
    assert "customizedMetadata" in json.loads(manager.DescribeModel(model_name="echo", customized=True).msg)[0]


def test_list_has_pages(manager: Stub) -> None:
    everything = json.loads(manager.ListModels().msg)["models"]
    first = json.loads(manager.ListModels(limit=2).msg)
    second = json.loads(manager.ListModels(limit=100, next_page_token=int(first["nextPageToken"])).msg)
    assert first["models"] + second["models"] == everything and len(everything) == 5


def test_a_models_life(server: Server, manager: Stub, client: Stub) -> None:
    serving_models.write_linear(server.store, "life", version="1.0", file="life-1")
    serving_models.write_linear(server.store, "life", version="2.0", file="life-2")
    told = manager.RegisterModel(url="life-1.mar", initial_workers=1, synchronous=True, batch_size=3).msg
    assert told == 'Model "life" Version: 1.0 registered with 1 initial workers'
    assert server.describe("life")["batchSize"] == 3
    assert manager.RegisterModel(url="life-2.mar", initial_workers=1).msg == "Processing worker updates..."
    server.wait_for(lambda: len(server.manage("GET", "/models/life/all")) == 2, "the second version")
    server.wait_for(lambda: server.manage("GET", "/models/life/2.0")[0]["state"] == "READY", "its workers")
    told = manager.ScaleWorker(model_name="life", min_worker=2, synchronous=True).msg
    assert told == "Workers scaled to 2 for model: life"
    assert manager.ScaleWorker(model_name="life", max_worker=3).msg == "Processing worker updates..."
    error = refused(manager.UnregisterModel, model_name="life")
    assert error.code() == Code.UNKNOWN and "Cannot remove default version" in error.details()
    error = refused(manager.RegisterModel, url="life-2.mar", initial_workers=1, synchronous=True)
    assert error.code() == Code.UNKNOWN and "already registered" in error.details()
    told = manager.SetDefault(model_name="life", model_version="2.0").msg
    assert told == 'Default version successfully updated for model "life" to "2.0"'
    assert manager.UnregisterModel(model_name="life", model_version="1.0").msg == 'Model "life" unregistered'
    assert manager.UnregisterModel(model_name="life").msg == 'Model "life" unregistered'
    assert refused(client.Predictions, model_name="life").code() == Code.INTERNAL


NO_MODEL = "org.pytorch.serve.archive.model.ModelNotFoundException"
NO_VERSION = "org.pytorch.serve.archive.model.ModelVersionNotFoundException"
BAD_REQUEST = "org.pytorch.serve.http.BadRequestException"


@pytest.mark.parametrize(("method", "fields", "code", "text", "java_name"), [
    ("DescribeModel", {"model_name": "none"}, Code.NOT_FOUND, "Model not found: none", NO_MODEL),
    ("DescribeModel", {"model_name": "echo", "model_version": "9"}, Code.NOT_FOUND, "Model version: 9", NO_VERSION),
    ("DescribeModel", {}, Code.INVALID_ARGUMENT, "Parameter model_name is required.", BAD_REQUEST),
    ("RegisterModel", {}, Code.INVALID_ARGUMENT, "Parameter url is required.", BAD_REQUEST),
    ("RegisterModel", {"url": "none.mar"}, Code.NOT_FOUND, "none.mar", NO_MODEL),
    ("RegisterModel", {"url": "linear.mar", "runtime": "java"}, Code.INVALID_ARGUMENT, "Invalid RuntimeType",
     BAD_REQUEST),
    ("RegisterModel", {"url": "linear.mar", "batch_size": -1}, Code.INVALID_ARGUMENT, 'batch_size cannot be "-1"',
     BAD_REQUEST),
    ("RegisterModel", {"url": "linear.mar", "max_batch_delay": -5}, Code.INVALID_ARGUMENT, 'cannot be "-5"',
     BAD_REQUEST),
    ("ScaleWorker", {"model_name": "none"}, Code.NOT_FOUND, "Model not found: none", NO_MODEL),
    ("ScaleWorker", {"model_name": "echo", "min_worker": 5, "max_worker": 2}, Code.INVALID_ARGUMENT, "max_worker",
     BAD_REQUEST),
    ("ScaleWorker", {"model_name": "echo", "min_worker": -1}, Code.INVALID_ARGUMENT, 'min_worker cannot be "-1"',
     BAD_REQUEST),
    ("ScaleWorker", {"model_name": "echo", "max_worker": -1}, Code.INVALID_ARGUMENT, 'max_worker cannot be "-1"',
     BAD_REQUEST),
    ("ScaleWorker", {"model_name": "echo", "number_gpu": -1}, Code.INVALID_ARGUMENT, 'cannot be "-1"', BAD_REQUEST),
    ("SetDefault", {"model_name": "echo"}, Code.INVALID_ARGUMENT, "model_version", BAD_REQUEST),
    ("SetDefault", {"model_name": "echo", "model_version": "9"}, Code.NOT_FOUND, "9", NO_VERSION),
    ("UnregisterModel", {"model_name": "none"}, Code.NOT_FOUND, "Model not found: none", NO_MODEL),
])  # fmt: skip
def test_errors_of_management(  # noqa: PLR0917
    server: Server, manager: Stub, method: str, fields: dict[str, Any], code: Any, text: str, java_name: str
) -> None:
    before = len(server.describe("echo")["workers"])
    error = refused(getattr(manager, method), **fields)
    lines = error.details().split("\n")
    assert error.code() == code and text in lines[0] and lines[1] == java_name
    assert len(server.describe("echo")["workers"]) == before


def test_an_inference_port_has_no_management(server: Server) -> None:
    with Stub(server.grpc("inference"), MANAGING) as client:
        assert refused(client.ListModels).code() == Code.UNIMPLEMENTED
