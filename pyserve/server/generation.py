"""One generation of server processes: the server, its front ends if it has any, and the ways to and from them.

A server that crashed is followed by another one of the same generation. An upgrade has two at once: the one that
serves, and the one that takes its place. Main thread of the supervisor only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

from pyserve import launch
from pyserve.errors import JsonObject
from pyserve.fronts.meeting import Meeting
from pyserve.server.front_ends import FrontEnds
from pyserve.server.listeners import Listeners
from pyserve.server.orders import Order
from pyserve.worker.descendants import end_marked, new_token


class Generation:
    """Starts nothing by itself.

    Args:
        program: which its processes are started from.
        listeners: where it accepts.
        files: descriptors that its processes inherit.
        front_end_count: how many there are; 0 for none.
        handed: what all of its processes are handed.
        adopted: what `to_json` gave in the program that this process was before.

    Attributes:
        process: the server; None while there is none.
        reports: what it says; None when it has said all.
    """

    def __init__(
        self, program: launch.Program, listeners: Listeners, files: Iterable[int], front_end_count: int, *,
        handed: Callable[[], JsonObject], adopted: JsonObject | None = None,
    ):  # fmt: skip
        self.program = program
        self.process: launch.Process | None = None
        self.reports: launch.ReportReader | None = None
        self._listeners = listeners
        self._files = list(files)
        self._handed = handed
        self._orders_fd = -1
        self._family = adopted["family"] if adopted else new_token()
        self._meeting: Meeting | None = None
        if front_end_count:
            self._meeting = Meeting.of_engine(adopted["meeting"]) if adopted else Meeting.make()
        self.front_ends = FrontEnds(front_end_count, self._start_front_end)
        if adopted:
            self.process = launch.AdoptedProcess(adopted["pid"])
            self.reports = launch.ReportReader(adopted["reports_fd"])
            self._orders_fd = adopted["orders_fd"]
            for fd in (adopted["reports_fd"], adopted["orders_fd"]):
                os.set_inheritable(fd, False)
            self.front_ends.adopt(adopted["front_ends"])

    @property
    def is_whole(self) -> bool:
        """Whether there is a server, and it has not said its last word."""
        return self.process is not None and self.reports is not None

    def start(self, restart: int, *, is_successor: bool = False) -> None:
        """Starts a server, and the front ends that do not run.

        Args:
            restart: as in `handover.ServerStart`.
            is_successor: another generation serves, and this one is to take its place.

        Raises:
            OSError: it cannot be started.
        """
        files, sockets = list(self._files), set(self._listeners.sockets.values())
        if self._meeting is not None:
            files.append(self._meeting.sock.fileno())
        orders_fd, mine = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        handover = {
            **self._handover(), "restart": restart, "is_successor": is_successor, "orders_fd": orders_fd,
            "sockets": {name: each.fileno() for name, each in self._listeners.sockets.items()},
            "fronts": self._meeting.for_engine() if self._meeting else None,
        }  # fmt: skip
        try:
            child = launch.spawn(
                self.program.server, launch.SERVER_VARIABLE, handover,
                sockets=sockets, files=[*files, orders_fd], program=self.program,
            )  # fmt: skip
        except BaseException:
            os.close(mine)
            raise
        finally:
            os.close(orders_fd)
        self.process, self._orders_fd = child.popen, mine
        self.reports = launch.ReportReader(child.reports_fd)
        self.front_ends.start_missing()

    def order(self, order: Order) -> None:
        """Has the server do it, if there is one."""
        with contextlib.suppress(OSError):  # it has just ended, which is noticed elsewhere
            os.write(self._orders_fd, f"{order.value}\n".encode())

    def close_reports(self) -> None:
        """After the caller has ceased to wait for them."""
        if self.reports is not None:
            self.reports.close()
            self.reports = None

    def ended(self) -> int:
        """To be called when the server has ended: its exit code. Clears up what it can have left."""
        assert self.process is not None
        code = self.process.wait()
        self.process = None
        self.close_reports()
        os.close(self._orders_fd)
        self._orders_fd = -1
        end_marked(self._family)  # what handlers started in sessions of its own, if the server could not see to it
        return code

    def kill(self) -> None:
        """Ends the server and what it started, at once; the front ends stay."""
        if self.process is not None:
            self.process.kill()
            self.ended()

    def close(self) -> None:
        """After the last of its processes has ended."""
        if self._meeting is not None:
            self._meeting.sock.close()

    def to_json(self) -> JsonObject:
        """For the program that this process is about to become. Its descriptors become inheritable."""
        assert self.process is not None and self.reports is not None
        for fd in (self.reports.fd, self._orders_fd):
            os.set_inheritable(fd, True)
        if self._meeting is not None:
            self._meeting.sock.set_inheritable(True)
        return {
            "pid": self.process.pid,
            "reports_fd": self.reports.fd,
            "orders_fd": self._orders_fd,
            "family": self._family,
            "meeting": self._meeting.for_engine() if self._meeting else None,
            "front_ends": self.front_ends.pids,
        }

    def _handover(self) -> JsonObject:
        return {**self._handed(), "parent_pid": os.getpid(), "family": self._family}

    def _start_front_end(self, number: int) -> launch.Child:
        assert self._meeting is not None
        sockets = self._listeners.of_front_end(number)
        handover = {
            **self._handover(), "restart": 0, "is_successor": False, "orders_fd": -1,
            "sockets": {name: each.fileno() for name, each in sockets.items()},
            "fronts": self._meeting.for_front_end(number),
        }  # fmt: skip
        return launch.spawn(
            self.program.front_end, launch.SERVER_VARIABLE, handover,
            sockets=set(sockets.values()), files=self._files, program=self.program,
        )  # fmt: skip
