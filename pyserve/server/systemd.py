"""What systemd is told of a service of ``Type=notify``, see sd_notify(3). Without NOTIFY_SOCKET nothing is."""

from __future__ import annotations

import contextlib
import os
import socket
import time


class Systemd:
    """Main thread of the supervisor only.

    Args:
        address: of the datagram socket: a path, or ``@`` and an abstract name; ``""`` for none.
        watchdog_s: how often it has to hear that all is well; None if it does not.

    Attributes:
        deadline: when it is to be told next, s of ``time.monotonic()``; None for never.
    """

    def __init__(self, address: str, watchdog_s: float | None = None):
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._interval_s = watchdog_s / 2 if watchdog_s and address else None
        self.deadline = None if self._interval_s is None else time.monotonic()

    @classmethod
    def of_environment(cls) -> Systemd:
        """The one that has started this process."""
        usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
        is_ours = usec.isdigit() and pid in ("", str(os.getpid()))
        return cls(os.environ.get("NOTIFY_SOCKET", ""), int(usec) / 1e6 if is_ours else None)

    def ready(self, status: str = "serving") -> None:
        self._send("READY=1", f"STATUS={status}")

    def reloading(self, status: str) -> None:
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", f"STATUS={status}")

    def stopping(self) -> None:
        self._send("STOPPING=1", "STATUS=answering what was accepted")

    def look(self) -> None:
        """Says that all is well, if it is time. To be called from the loop that would stand still if it were not."""
        if self._interval_s is not None and self.deadline is not None and time.monotonic() >= self.deadline:
            self.deadline = time.monotonic() + self._interval_s
            self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)  # one that does not read must not hold the supervisor
            sock.sendto("\n".join(lines).encode(), self._address)
