"""A server's front ends, one by one."""

from __future__ import annotations

import time

import psutil

from tests.support.serving import LIMIT_S, Client, Server


def through(server: Server, process: psutil.Process, port: str = "inference") -> Client:
    """A client whose connection is in that front end."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        client = server.client(port)
        client.ask("GET", "/live")
        own = client._connection.sock.getsockname()
        held = {each.raddr for each in process.net_connections("tcp") if each.raddr}
        if tuple(own) in {tuple(each) for each in held}:
            return client
        client.close()
    raise AssertionError("no connection came to that front end")


def scrape(server: Server) -> str:
    """The metrics, with all that front ends have counted: each says it before it hands on a scrape."""
    for process in server.front_ends:
        with through(server, process, "metrics") as client:
            client.ask("GET", "/metrics")
    return server.ask("GET", "/metrics", port="metrics").body.decode()
