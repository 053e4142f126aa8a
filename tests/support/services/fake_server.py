"""A server without models that keeps the supervisor's contract and answers HTTP by hand.

``FAKE_SERVER`` says how it behaves:

    ""             ready at once, ends at the first SIGTERM
    fail           reports ``failed`` and ends as a server does whose start will fail again
    crash          ends with exit code 1 before it is ready
    failed_model   ready, with one model that did not load
    stubborn       takes the first SIGTERM for the begin of a drain that never ends; ends with 1 at the second
    deaf           ignores SIGTERM and SIGINT
    slow           never becomes ready
    fail_again     ready; the first two that follow it report ``failed``, the next is ready

One that is to take another's place behaves as ``FAKE_SUCCESSOR`` says, if that is a file, with its content:

    ""             reports what it has, waits for the order to open, and is ready
    fail, crash, slow, failed_model    as above
    mute           has loaded, and is never ready
    other_version  as failed_model, with another version of the model that there is
    late           has loaded, and is ready when the file is empty

A restarted server waits until ``FAKE_SERVER_GATE``, a FIFO, is opened for writing, if there is one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

from pyserve import launch
from pyserve.server.handover import ServerStart, receive_server_start

MODELS: list[dict[str, Any]] = [
    {"model": "m", "version": "1.0", "state": "READY", "workers": 1, "device": "cpu", "batch": 4, "url": "U"},
]
FAILED_MODEL: dict[str, Any] = {
    "model": "bad",
    "version": "1.0",
    "state": "FAILED",
    "error": "bad.mar: no MAR-INF/MANIFEST.json",
}
DESCRIPTION = {
    "modelName": "m",
    "modelVersion": "1.0",
    "minWorkers": 2,
    "batchSize": 4,
    "deviceType": "cpu",
    "workers": [{"id": "9000", "status": "READY"}, {"id": "9001", "status": "READY"}],
}

behaviour = os.environ.get("FAKE_SERVER", "")
term_count = 0
orders = b""


def on_stop(number: int, *_: object) -> None:
    global term_count
    term_count += 1
    os.write(1, f"{signal.Signals(number).name} {term_count}\n".encode())  # a signal may come while `print` is at work
    if behaviour == "stubborn" and term_count == 1:
        return
    if behaviour != "deaf":
        sys.exit(1 if behaviour == "stubborn" else launch.EXIT_DRAINED)


def next_order(fd: int) -> str:
    """Waits for it."""
    global orders
    while b"\n" not in orders:
        select.select([fd], [], [])
        orders += os.read(fd, 4096)
    order, _, orders = orders.partition(b"\n")
    return order.decode()


def answer(connection: socket.socket, start: ServerStart) -> None:
    request = b""
    while b"\r\n\r\n" not in request:
        chunk = connection.recv(65536)
        if not chunk:
            return
        request += chunk
    path = request.split()[1].decode()
    body: object = {"pid": os.getpid(), "restart": start.restart, "sockets": sorted(start.sockets)}
    if path.startswith("/models?"):
        body = {"models": [{"modelName": "m", "modelUrl": "m.mar"}]}
    elif path == "/models/m/all":
        body = [DESCRIPTION]
    content = json.dumps(body).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
    connection.sendall(head.encode() + content)


def main() -> int:
    signal.signal(signal.SIGTERM, on_stop)
    signal.signal(signal.SIGINT, on_stop)
    global behaviour
    start = receive_server_start()
    if start.is_successor:
        with open(os.environ["FAKE_SUCCESSOR"]) as file:
            behaviour = file.read()
    gate = os.environ.get("FAKE_SERVER_GATE")
    if gate and start.restart:
        with open(gate, "rb") as fifo:
            fifo.read()
    start.report.progress("m", "reading weights 40/110 MB")
    if behaviour == "fail" or (behaviour == "fail_again" and start.restart in (1, 2)):
        start.report.failed("m.mar: the weights do not fit the model file")
        return launch.EXIT_WILL_FAIL_AGAIN
    if behaviour == "crash":
        print("Traceback: the fake server crashes", file=sys.stderr)
        return 1
    while behaviour == "slow":
        signal.pause()
    models = [*MODELS, FAILED_MODEL] if behaviour == "failed_model" else MODELS
    if behaviour == "other_version":
        models = [{**MODELS[0], "version": "2.0"}]
    if start.is_successor:
        start.report.send("loaded", models=models)
        assert next_order(start.orders_fd) == "open"
        while behaviour == "mute":
            signal.pause()
        while behaviour == "late" and os.stat(os.environ["FAKE_SUCCESSOR"]).st_size:
            time.sleep(0.02)
    start.report.ready(models, ["dog.mar"], "curl http://127.0.0.1:8080/predictions/m -T sample.jpg")
    listeners = set(start.sockets.values())
    while True:
        for listener in select.select([*listeners, start.orders_fd], [], [])[0]:
            if listener == start.orders_fd:
                order = next_order(start.orders_fd)
                os.write(1, f"order: {order}\n".encode())
                if order == "hold":
                    start.report.send("held", failed=[], models=[["m", "1.0"]])
                if order == "give way":
                    return launch.EXIT_DRAINED
                continue
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                continue
            with connection:
                connection.setblocking(True)
                answer(connection, start)


if __name__ == "__main__":
    sys.exit(main())
