"""The same predictions over HTTP and over gRPC, side by side, in a closed loop against a server that runs.

    python bench/transports.py --model digits --data digit.bin --concurrency 8 --tensor FP32:1,64

With --tensor they are sent by the Open Inference Protocol too, as one raw tensor: over HTTP by its binary extension.
Both clients are asyncio's: gRPC's own, and for HTTP the wire of bench/latency.py. Either takes more CPU than the server
does for a cheap model, so run it on a machine with cores to spare, and read the figures as those of both ends together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpc.aio
import uvloop

from pyserve.grpc_api.messages import INFERENCE, message

Ask = Callable[[int], Awaitable[None]]

WARMUP_S = 1.0


class HttpClients:
    """Kept connections, one per client."""

    def __init__(self, address: str, path: str, body: bytes, headers: str = ""):
        host, _, port = address.rpartition(":")
        self._address = host, int(port)
        head = (f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/octet-stream\r\n{headers}"
                f"Content-Length: {len(body)}\r\n\r\n")  # fmt: skip
        self._request = head.encode() + body
        self._streams: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def ask(self, client: int) -> None:
        """One request, its answer read."""
        if client not in self._streams:
            self._streams[client] = await asyncio.open_connection(*self._address)
        reader, writer = self._streams[client]
        writer.write(self._request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(head.decode())
        await reader.readexactly(int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]))


class GrpcClients:
    """One channel for all clients, as gRPC's users have it."""

    def __init__(self, address: str, path: str, request: Any, response: str):
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
        self._request = request
        self._call = self._channel.unary_unary(
            path, request_serializer=type(request).SerializeToString, response_deserializer=message(response).FromString
        )

    async def ask(self, client: int) -> None:
        """One call."""
        await self._call(self._request)


async def measure(ask: Ask, concurrency: int, seconds: float) -> list[float]:
    """Latencies in s of the answers within the window, after a warm-up."""
    started = time.perf_counter()
    opens, ends = started + WARMUP_S, started + WARMUP_S + seconds
    latencies: list[float] = []

    async def run(client: int) -> None:
        while (began := time.perf_counter()) < ends:
            await ask(client)
            if began >= opens:
                latencies.append(time.perf_counter() - began)

    await asyncio.gather(*(run(client) for client in range(concurrency)))
    return sorted(latencies)


async def compare(arguments: argparse.Namespace) -> None:
    body, model = arguments.data.read_bytes(), arguments.model
    request = message(f"{INFERENCE}.PredictionsRequest")(model_name=model, input={"data": body})
    path, response = f"/{INFERENCE}.InferenceAPIsService/Predictions", f"{INFERENCE}.PredictionResponse"
    sides: dict[str, Ask] = {
        "HTTP": HttpClients(arguments.http, f"/predictions/{model}", body).ask,
        "gRPC": GrpcClients(arguments.grpc, path, request, response).ask,
    }
    if arguments.tensor:
        sides |= tensor_sides(arguments, body)
    print(f"{arguments.model}, {len(body)} bytes, {arguments.concurrency} clients, {arguments.seconds:g} s each")
    print(f"{'':10}{'per s':>10}{'p50 ms':>10}{'p99 ms':>10}")
    for name, ask in sides.items():
        latencies = await measure(ask, arguments.concurrency, arguments.seconds)
        count = len(latencies)
        p50, p99 = latencies[count // 2] * 1e3, latencies[min(count - 1, count * 99 // 100)] * 1e3
        print(f"{name:10}{count / arguments.seconds:>10.0f}{p50:>10.2f}{p99:>10.2f}")


def tensor_sides(arguments: argparse.Namespace, body: bytes) -> dict[str, Ask]:
    """The same as one tensor of the Open Inference Protocol."""
    datatype, _, sizes = arguments.tensor.partition(":")
    shape, name = [int(size) for size in sizes.split(",")], arguments.input_name
    entry = {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(body)}}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    request = message("inference.ModelInferRequest")(
        model_name=arguments.model, raw_input_contents=[body],
        inputs=[{"name": name, "datatype": datatype, "shape": shape}],
    )  # fmt: skip
    http = HttpClients(
        arguments.http, f"/v2/models/{arguments.model}/infer", head + body,
        f"Inference-Header-Content-Length: {len(head)}\r\n",
    )  # fmt: skip
    path = "/inference.GRPCInferenceService/ModelInfer"
    grpc_side = GrpcClients(arguments.grpc, path, request, "inference.ModelInferResponse")
    return {"HTTP v2": http.ask, "gRPC v2": grpc_side.ask}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="the body, and the input 'data'")
    parser.add_argument("--http", default="127.0.0.1:8080", metavar="HOST:PORT")
    parser.add_argument("--grpc", default="127.0.0.1:7070", metavar="HOST:PORT")
    parser.add_argument("--tensor", metavar="DATATYPE:SHAPE", help="what the body is, such as FP32:1,64")
    parser.add_argument("--input-name", default="input0", metavar="NAME", help="of that tensor")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S")
    uvloop.run(compare(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
