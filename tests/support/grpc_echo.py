"""A handler that says what it got over gRPC and does as the request asks, and requests for it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from tests.support.serving import LIMIT_S

# Says what it got; does what the input `order` asks for.
ECHO = """
import json
import os
import time

from ts.handler_utils.utils import send_intermediate_predict_response
from ts.utils.util import PredictionException


def handle(data, context):
    if data is None:
        return None
    answers = []
    for index, row in enumerate(data):
        order = json.loads(row["order"]) if "order" in row else {}
        if "running" in order:
            open(order["running"], "a").write("x")
        while "until" in order and not os.path.exists(order["until"]):
            time.sleep(0.001)
        if "error" in order:
            raise ValueError(order["error"])
        if "code" in order:
            raise PredictionException("as asked", order["code"])
        for part in range(order.get("parts", 0)):
            text = f"part {part} " if "part_size" not in order else "x" * order["part_size"]
            send_intermediate_predict_response([text] * len(data), context.request_ids, "ok", 200, context)
        if order.get("fail_late"):
            raise ValueError("too late")
        if "status" in order:
            context.set_response_status(code=order["status"], idx=index)
        answer = {key: [type(value).__name__, bytes(value).decode()[:100]] for key, value in row.items()}
        answer["headers"] = dict(context.get_all_request_header(index))
        answers.append("x" * order["size"] if "size" in order else json.dumps(answer))
    return answers
"""


def order(**members: Any) -> dict[str, bytes]:
    return {"order": json.dumps(members).encode()}


def wait_until_there(path: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < deadline, path
        threading.Event().wait(0.005)
