"""How a supervisor becomes that of another build of pyserve: by execve(2), with all that it has.

The process stays: its id, its parent, its children, its terminal, its place under a service manager and in a container.
Whether the other build can continue is tried before, by a process of that build that is handed the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pyserve import launch
from pyserve.config.config import Config
from pyserve.errors import JsonObject
from pyserve.os_errors import cause_of
from pyserve.server import pid_file
from pyserve.server.control import Control, ControlClient
from pyserve.server.listeners import Listeners
from pyserve.server.own_folder import OwnFolder

CONTINUE = "continue"
"""The member of a handover that says that its process is a supervisor already."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

logger = logging.getLogger("pyserve.supervisor")


class Image:
    """What a supervisor has for as long as its process lives.

    Args:
        pid_path, plain_pid_path: see `pid_file.PidFiles`.
        folder: where relative paths are meant from, which may be gone by now; None for the current one.
        pause: ends what other threads of this process do to its files; called before it becomes another program.
        resume: the inverse, if it could not.
    """

    def __init__(
        self, config: Config, own_folder: OwnFolder, memory: tuple[int, ...], *, pid_path: Path,
        plain_pid_path: Path | None, log_file: str, drains_on_hangup: bool, folder: Path | None = None,
    ):  # fmt: skip
        self.config = config
        self.folder = Path.cwd() if folder is None else folder
        self.own_folder = own_folder
        self.memory = memory
        self.pid_path = pid_path
        self.plain_pid_path = plain_pid_path
        self.log_file = log_file
        self.drains_on_hangup = drains_on_hangup
        self.listeners = Listeners()
        self.control: Control | None = None
        self.running: pid_file.RunningServer | None = None
        self.pause: Callable[[], None] = lambda: None
        self.resume: Callable[[], None] = lambda: None

    def rehearse(self, program: launch.Program, supervisor: JsonObject, output: BinaryIO) -> launch.Child:
        """A process of ``program`` that reads what it would continue with, reports ``rehearsed`` and ends.

        Raises:
            OSError: it cannot be started.
        """
        handover = {**self._handover(program, supervisor, client=-1), "rehearses": True}
        return launch.spawn(
            program.supervisor, launch.SUPERVISOR_VARIABLE, handover, output_fd=output.fileno(), program=program
        )

    def become(self, program: launch.Program, supervisor: JsonObject, client: ControlClient) -> str:
        """Continues as ``program``. Returns only if that cannot be, and why.

        Args:
            supervisor: what `Supervisor.to_json` gives.
            client: who is answered by it.
        """
        assert self.control is not None
        self.pause()
        # What comes meanwhile waits until the other build's supervisor has handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        asking = [] if client.is_gone else [client.sock.fileno()]
        handed = [*self.memory, self.control.sock.fileno(), *asking, *self.listeners.descriptors]
        try:
            for fd in handed:
                os.set_inheritable(fd, True)
            config_fd = launch.memory_file(self._handover(program, supervisor, asking[0] if asking else -1))
            report_fd = os.open(os.devnull, os.O_WRONLY)
            for fd in (config_fd, report_fd):
                os.set_inheritable(fd, True)
            place = json.dumps({"config_fd": config_fd, "report_fd": report_fd})
            words = [pid_file.TORCHSERVE_WORD] if self.plain_pid_path is not None else []
            environment = launch.environment_of(program) | _kept_for_supervisor() | {launch.SUPERVISOR_VARIABLE: place}
            os.execve(program.supervisor[0], [*program.supervisor, *words], environment)
        except OSError as error:
            for fd in handed:
                with contextlib.suppress(OSError):
                    os.set_inheritable(fd, False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            self.resume()
            return f"{program.supervisor[0]}: {cause_of(error)}"

    def _handover(self, program: launch.Program, supervisor: JsonObject, client: int) -> JsonObject:
        assert self.control is not None and self.running is not None
        return {
            CONTINUE: True,
            "rehearses": False,
            "config": self.config.to_json(),
            "folder": str(self.folder),
            "own_folder": str(self.own_folder.path or ""),
            "memory": self.memory,
            "pid_file": str(self.pid_path.absolute()),
            "plain_pid_file": str(self.plain_pid_path or ""),
            "log_file": self.log_file,
            "drains_on_hangup": self.drains_on_hangup,
            "listeners": self.listeners.to_json(),
            "control": self.control.sock.fileno(),
            "client": client,
            "running": vars(self.running),
            "supervisor": supervisor,
            "program": program._asdict(),
        }

    @classmethod
    def of(cls, handover: JsonObject) -> Image:
        """The inverse, in the other program. Touches no descriptor if it only rehearses."""
        config = Config.from_json(handover["config"])
        image = cls(
            config,
            OwnFolder(config.state_dir, Path(handover["own_folder"]) if handover["own_folder"] else None,
                      is_guest=handover["rehearses"]),
            tuple(handover["memory"]),
            pid_path=Path(handover["pid_file"]),
            plain_pid_path=Path(handover["plain_pid_file"]) if handover["plain_pid_file"] else None,
            log_file=handover["log_file"], drains_on_hangup=handover["drains_on_hangup"],
            folder=Path(handover["folder"]),
        )  # fmt: skip
        image.running = pid_file.RunningServer(**handover["running"])
        if not handover["rehearses"]:
            for fd in (*handover["memory"], handover["control"], handover["client"]):
                if fd >= 0:
                    os.set_inheritable(fd, False)
            image.listeners = Listeners.adopt(handover["listeners"])
            image.control = Control(socket.socket(fileno=handover["control"]))
        return image


def _kept_for_supervisor() -> dict[str, str]:
    """Variables that children do not get, and another program in this process does."""
    names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    return {name: os.environ[name] for name in names if name in os.environ}
