"""Who listens on a port that is taken."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from pyserve.config.address import port_owner


@pytest.fixture(params=["127.0.0.1", "0.0.0.0", "::1", "::"])
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """A port that this process listens on, and is connected to."""
    host = request.param
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip(f"{host} is not to be had here")
        listener.listen()
        with socket.create_connection((host, listener.getsockname()[1])):
            yield listener.getsockname()[1]


def test_the_process_that_listens_is_named(port: int) -> None:
    words = " ".join(" ".join(psutil.Process().cmdline()).split())
    assert port_owner(port) == f"{words[:80].strip()} (pid {os.getpid()})"


def test_what_stands_in_its_command_line_changes_nothing_of_a_terminal(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, too: that of an interpreter may hold a whole program."""
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: ["odd", "-c", "\nimport a\r\n\tb\x1b[2J", ""])
    assert port_owner(port) == f"odd -c import a b\\x1b[2J (pid {os.getpid()})"


def test_a_free_port_and_one_of_a_connection_alone_belong_to_nobody() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert port_owner(port) == "", "bound, but not listening"
        listener.listen()
        with socket.create_connection(("127.0.0.1", port)) as client:
            assert port_owner(client.getsockname()[1]) == ""
    assert port_owner(port) == ""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_process_of_another_user_is_not_seen_and_nothing_is_raised() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                listener.close()  # its parent listens, and nobody else
                os.setgid(65534)
                os.setuid(65534)
                os.write(writer, f"{os.getuid()} {port_owner(port)!r}".encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        with open(reader) as file:
            assert file.read() == "65534 ''"


@pytest.mark.parametrize(
    "error", [psutil.AccessDenied(1), psutil.NoSuchProcess(1), OSError("no /proc"), RuntimeError("odd")]
)
def test_what_cannot_be_found_out_is_no_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(kind: str) -> Any:
        raise error

    monkeypatch.setattr(psutil, "net_connections", refuse)
    assert port_owner(8080) == ""
