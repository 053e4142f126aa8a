"""The kinds of requests over gRPC."""

from __future__ import annotations

import struct
from typing import Any

import grpc

from pyserve.grpc_api.messages import OPEN_INFERENCE
from tests.chaos import ledger, models
from tests.chaos.http_client import LIMIT_S
from tests.chaos.kinds import CURRENT, OTHER, Echo, Seen, numbers_of
from tests.chaos.ledger import Expectations
from tests.support.grpc_calls import PREDICTIONS, Stub

# Statuses of HTTP that stand for those of gRPC in the ledger, so that costs are said once.
_AS_HTTP = {
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 503,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNIMPLEMENTED: 405,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
}
# grpcio's own words for a connection that could not be made; nothing was sent then.
_NOT_SENT = ("failed to connect", "connection refused", "connections to all backends failing", "handshake")
# A channel that lost its connection waits this long at most before it tries again; by default up to 2 minutes.
_RECONNECT = {
    "grpc.initial_reconnect_backoff_ms": 50,
    "grpc.min_reconnect_backoff_ms": 50,
    "grpc.max_reconnect_backoff_ms": 200,
    "grpc.enable_retries": 0,
}


class GrpcKind:
    """One kind of requests over a channel that is kept."""

    name: str
    model: str
    service: str

    def __init__(self, target: str, expectations: Expectations):
        self._target = target
        self._expectations = expectations
        self._stub: Stub | None = None

    def close(self) -> None:
        if self._stub is not None:
            self._stub.channel.close()
        self._stub = None

    def ask(self, id: str) -> Seen:
        """Sends the request of this id and judges its answer."""
        if self._stub is None:
            self._stub = Stub(self._target, self.service, **_RECONNECT)
        try:
            return self.call(self._stub, id)
        except grpc.RpcError as error:
            return self._failed(error)

    def call(self, stub: Stub, id: str) -> Seen:
        raise NotImplementedError

    @staticmethod
    def _failed(error: Any) -> Seen:
        code, details = error.code(), str(error.details())
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Seen(ledger.HUNG, 0, details)
        if code is grpc.StatusCode.UNAVAILABLE and not details.startswith("{") and "\n" not in details:
            is_unsent = any(words in details.lower() for words in _NOT_SENT)
            return Seen(ledger.UNREACHABLE if is_unsent else ledger.LOST, 0, details)
        if code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN) and "\n" not in details:
            return Seen(ledger.LOST, 0, f"{code}: {details}")
        return Seen(ledger.REFUSED, _AS_HTTP.get(code, 503), f"{code}: {details[:300]}")


class Predictions(GrpcKind):
    """TorchServe's service, to the Python handler that answers what it got."""

    name, model, service = "grpc predictions", "echo", PREDICTIONS

    def call(self, stub: Stub, id: str) -> Seen:
        payload = Echo.payload(id)
        self._expectations.remember(id, [payload[:64]])
        answer = stub.Predictions(model_name=self.model, input={"data": payload}, timeout=LIMIT_S)
        if answer.prediction == payload:
            return Seen(ledger.RIGHT, 200)
        named = self._expectations.name(answer.prediction[:64], id)
        return Seen(named, 200, f"{len(answer.prediction)} bytes for {len(payload)}: {answer.prediction[:200]!r}")


class ModelInfer(GrpcKind):
    """The Open Inference Protocol, to the native lane."""

    name, model, service = "grpc infer", "linear", f"{OPEN_INFERENCE}.GRPCInferenceService"

    def call(self, stub: Stub, id: str) -> Seen:
        numbers = numbers_of(id)
        expected = models.mixed(numbers, CURRENT)
        self._expectations.remember(id, [expected])
        tensor = {"name": "input", "datatype": "FP32", "shape": [1, 4]}
        answer = stub.ModelInfer(model_name=self.model, id=id, inputs=[tensor],
                                 raw_input_contents=[struct.pack("<4f", *numbers)], timeout=LIMIT_S)  # fmt: skip
        got = bytes(answer.raw_output_contents[0]) if answer.raw_output_contents else struct.pack(
            "<4f", *answer.outputs[0].contents.fp32_contents)  # fmt: skip
        if answer.id != id:
            return Seen(ledger.SWAPPED, 200, f"answered with the id {answer.id}")
        if got == expected:
            return Seen(ledger.RIGHT, 200)
        if got == models.mixed(numbers, OTHER):
            return Seen(ledger.OTHER_VERSION, 200)
        return Seen(self._expectations.name(got, id), 200, f"expected {expected!r}, got {got!r}")


GRPC_KINDS: list[type[GrpcKind]] = [Predictions, ModelInfer]
