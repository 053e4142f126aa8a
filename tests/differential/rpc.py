"""gRPC calls of a case, with pyserve's own copy of the messages."""

from __future__ import annotations

import json
from typing import Any

import grpc
from google.protobuf import json_format

from tests.differential.case import Call
from tests.differential.servers import Running
from tests.support.grpc_calls import MANAGING, PREDICTIONS, Stub

SERVICES = {"inference": PREDICTIONS, "management": MANAGING}


def send_grpc(call: Call, server: Running) -> dict[str, Any]:
    """``status`` is gRPC's code; ``body`` the message as JSON, or the error's details."""
    api, _, method = str(call.written["grpc"]).partition(" ")
    with Stub(f"127.0.0.1:{server.ports[f'grpc_{api}']}", SERVICES[api]) as stub:
        ask, request_class = stub.method(method)
        request = json_format.ParseDict(call.written.get("json", {}), request_class())
        metadata = [(name.lower(), value) for name, value in call.written.get("headers", {}).items()]
        many = isinstance(call.written.get("json"), list)
        try:
            answer = ask(iter([request]) if many else request, metadata=metadata, timeout=call.wait_s)
            messages = [answer] if hasattr(answer, "DESCRIPTOR") else list(answer)
        except grpc.RpcError as error:
            return {"status": error.code().name, "body": error.details()}
    bodies = [json_format.MessageToDict(each, preserving_proto_field_name=True) for each in messages]
    return {"status": "OK", "body": json.dumps(bodies if len(bodies) != 1 else bodies[0], indent=1)}
