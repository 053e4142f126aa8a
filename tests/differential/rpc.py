"""gRPC calls of a case, with pyserve's own copy of the messages."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import grpc
from google.protobuf import json_format

from pyserve.grpc_api.messages import OPEN_INFERENCE_TORCHSERVE
from tests.differential.case import Call
from tests.differential.servers import Running
from tests.differential.wire import filled
from tests.support.grpc_calls import MANAGING, PREDICTIONS, Stub

# What a case calls a service -> its port and its name.
SERVICES = {
    "inference": ("grpc_inference", PREDICTIONS),
    "management": ("grpc_management", MANAGING),
    "open": ("grpc_inference", f"{OPEN_INFERENCE_TORCHSERVE}.GRPCInferenceService"),
}


def send_grpc(call: Call, server: Running) -> dict[str, Any]:
    """``status`` is gRPC's code; ``body`` the message as JSON, or the error's details."""
    api, _, method = str(call.written["grpc"]).partition(" ")
    port, service = SERVICES[api]
    with Stub(f"127.0.0.1:{server.ports[port]}", service) as stub:
        ask, request_class = stub.method(method)
        written = json.loads(filled(json.dumps(call.written.get("json", {})), server))
        metadata = [(name.lower(), filled(value, server)) for name, value in call.written.get("headers", {}).items()]
        request: Any
        if isinstance(written, list):
            request = iter([json_format.ParseDict(each, request_class()) for each in written])
        else:
            request = json_format.ParseDict(written, request_class())
        try:
            answer = ask(request, metadata=metadata, timeout=call.wait_s)
            messages = [answer] if hasattr(answer, "DESCRIPTOR") else list(answer)
        except grpc.RpcError as error:
            return {"status": error.code().name, "body": error.details()}
    bodies = [_readable(json_format.MessageToDict(each, preserving_proto_field_name=True)) for each in messages]
    if api == "management":
        return {"status": "OK", "body": bodies[0]["msg"]}
    return {"status": "OK", "body": json.dumps(bodies if len(bodies) != 1 else bodies[0], indent=1)}


def _readable(message: dict[str, Any]) -> dict[str, Any]:
    """With a prediction's bytes as text where they are some."""
    if "prediction" in message:
        with contextlib.suppress(UnicodeDecodeError):
            message["prediction"] = base64.b64decode(message["prediction"]).decode()
    return message
