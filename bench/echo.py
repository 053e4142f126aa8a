"""The ceiling that serving is measured against: uvloop + httptools, the request's body is the answer, nothing else.

    python bench/echo.py --port 9090
    python bench/latency.py --url http://127.0.0.1:9090/ --data kitten.jpg --concurrency 64

Each request is parsed with httptools as a server must (URL, headers, body), and answered in order with keep-alive.
There are no limits, no timeouts and no routes: do not let others reach it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from typing import cast

import httptools
import uvloop

BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class EchoProtocol(asyncio.Protocol):
    """One connection. Headers are collected as a server would, then dropped."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body = bytearray()
        self._keep_alive = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are no subclass

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._transport is not None and not self._transport.is_closing():
                self._transport.write(BAD_REQUEST)
                self._transport.close()

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers = []
        self._body = bytearray()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._keep_alive = self._parser.should_keep_alive()
        for name, value in self._headers:
            if name.lower() == b"expect" and value.lower() == b"100-continue" and self._transport is not None:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._transport is None:
            return
        connection = b"" if self._keep_alive else b"Connection: close\r\n"
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n" % (len(self._body), connection)
        self._transport.write(head + self._body)
        if not self._keep_alive:
            self._transport.close()


async def serve(host: str, port: int) -> None:
    """Serves until SIGINT or SIGTERM. Port 0 takes a free one; the line printed names it."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stopped.set)
    server = await loop.create_server(EchoProtocol, host, port, backlog=2048)
    bound = server.sockets[0].getsockname()
    print(f"echo on http://{host}:{bound[1]}/  (Ctrl-C ends)", flush=True)
    await stopped.wait()
    server.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Bare uvloop + httptools echo server: the ceiling for HTTP serving.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=9090, help="port to listen on, 0 for any (default: %(default)s)")
    args = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        try:
            uvloop.run(serve(args.host, args.port))
        except (OSError, OverflowError) as error:
            print(f"error: cannot listen on {args.host}:{args.port}: {error}; choose another --port", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
