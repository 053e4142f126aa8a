"""A gRPC client of the tests: the services' methods by name, with pyserve's own messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from pyserve.grpc_api.messages import INFERENCE, MANAGEMENT, POOL, message
from tests.support.serving import LIMIT_S, Server

PREDICTIONS = f"{INFERENCE}.InferenceAPIsService"
MANAGING = f"{MANAGEMENT}.ManagementAPIsService"


class Stub:
    """One service over one channel; a context. ``stub.Predictions(model_name="m")`` calls."""

    def __init__(self, target: str, service: str, **options: Any):
        limits = {"grpc.max_receive_message_length": -1, "grpc.max_send_message_length": -1, **options}
        self.channel = grpc.insecure_channel(target, options=list(limits.items()))
        self._service = POOL.FindServiceByName(service)

    def method(self, name: str) -> tuple[Any, Any]:
        """The callable of grpc, and the class of its request."""
        method = self._service.methods_by_name[name]
        streams = {(False, False): "unary_unary", (False, True): "unary_stream", (True, True): "stream_stream"}
        make = getattr(self.channel, streams[method.client_streaming, method.server_streaming])
        request, response = message(method.input_type.full_name), message(method.output_type.full_name)
        call = make(
            f"/{self._service.full_name}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        return call, request

    def __getattr__(self, name: str) -> Any:
        call, request = self.method(name)

        def ask(*, metadata: Any = None, timeout: float = LIMIT_S, **fields: Any) -> Any:
            return call(request(**fields), metadata=metadata, timeout=timeout)

        return ask

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


def stub(server: Server, service: str = PREDICTIONS, **options: Any) -> Stub:
    return Stub(server.grpc("management" if service == MANAGING else "inference"), service, **options)


def refused(call: Any, **fields: Any) -> grpc.RpcError:
    """The error of a call that must fail."""
    with pytest.raises(grpc.RpcError) as raised:
        answer = call(**fields)
        if isinstance(answer, Iterator):
            list(answer)
    return raised.value
