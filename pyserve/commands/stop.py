"""``pyserve stop``: ask the running server to drain and wait until it is gone."""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

from pyserve.server import pid_file

DRAIN_MARGIN_S = 15.0


def stop_server(
    pid_path: Path, timeout_s: float | None, *, name: str = "pyserve", command: str = "pyserve stop"
) -> int:
    """Stop and return the exit code: 0 gone; 1 not running, or not gone in time.

    Args:
        timeout_s: how long to wait; by default somewhat longer than the server may drain.
        name, command: what the texts call the server, and this command.

    Raises:
        ConfigError: the pid file cannot be trusted.
        OSError: the server belongs to somebody else.
    """
    running = pid_file.read(pid_path)
    if running is None:
        print(f"{name} is not currently running.")
        return 1
    try:
        process_fd = os.pidfd_open(running.pid)
    except ProcessLookupError:
        print(f"{name} has stopped.")
        return 0
    try:
        if not running.is_alive:  # the pid may have changed hands before we had hold of the process
            print(f"{name} has stopped.")
            return 0
        signal.pidfd_send_signal(process_fd, signal.SIGTERM)
        limit_s = running.drain_timeout_s + DRAIN_MARGIN_S if timeout_s is None else timeout_s
        gone, _, _ = select.select([process_fd], [], [], limit_s)
    finally:
        os.close(process_fd)
    if gone:
        print(f"{name} has stopped.")
        return 0
    print(
        f"{name}: error: {name} (pid {running.pid}) is still draining after {limit_s:g} s; "
        f"a second `{command}` ends it at once",
        file=sys.stderr,
    )
    return 1
