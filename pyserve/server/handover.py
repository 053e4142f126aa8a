"""What the supervisor hands to the server that it starts."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from pyserve.config.config import Config
from pyserve.errors import JsonObject
from pyserve.launch import SERVER_VARIABLE, Reporter, die_with_parent, receive
from pyserve.security.tokens import Kept
from pyserve.server.kept_files import KeptFiles, SharedMemory
from pyserve.server.own_folder import OwnFolder


@dataclass
class ServerStart:
    """What the supervisor hands to the server.

    Attributes:
        config: the checked configuration.
        sockets: listening sockets by name; two names may share one.
        restart: 0 for the first server of this supervisor, then counting up.
        folder: the supervisor's current one when it began, which relative paths are meant from.
        kept: where the server keeps what a restarted one has to know.
        report: the way back to the supervisor.
        like_torchserve: the console has all that TorchServe's has.
        log_file: what this process prints to; ``""`` if that is a terminal.
        family: token of all servers of this supervisor, see `pyserve.worker.descendants`.
        fronts: what finds the engine process, or the front ends, see `fronts.meeting`; None without front ends.
        orders_fd: where the supervisor's orders come from; -1 in front ends.
        is_successor: another server accepts on ``sockets``, whose place this one is to take.
        keeps_sockets: clients who connect after this server has stopped accepting wait for the server that is next.
        is_embedded: the process is somebody else's: nothing of it is changed, and it is never ended.
    """

    config: Config
    sockets: dict[str, socket.socket]
    restart: int
    folder: Path
    kept: Kept
    report: Reporter
    like_torchserve: bool
    log_file: str
    family: str
    fronts: JsonObject | None = None
    orders_fd: int = -1
    is_successor: bool = False
    keeps_sockets: bool = False
    is_embedded: bool = False


def receive_server_start() -> ServerStart:
    """Take over from the supervisor; from here on this process dies with it.

    Raises:
        RuntimeError: the process was not started by a supervisor.
    """
    handover, report = receive(SERVER_VARIABLE)
    die_with_parent(handover["parent_pid"])
    by_fd: dict[int, socket.socket] = {}
    for fd in handover["sockets"].values():
        if fd not in by_fd:
            os.set_inheritable(fd, False)
            by_fd[fd] = socket.socket(fileno=fd)
    for fd in handover["memory"]:
        os.set_inheritable(fd, False)
    config = Config.from_json(handover["config"])
    own_folder = OwnFolder(config.state_dir, Path(handover["own_folder"]) if handover["own_folder"] else None)
    kept = KeptFiles(own_folder, SharedMemory(handover["memory"]))
    kept.look()  # somebody may have cleared the folder since the server before this one
    if config.self_signed_dir and own_folder.path is not None:
        config.self_signed_dir = str(own_folder.path)
    start = ServerStart(
        config=config,
        sockets={name: by_fd[fd] for name, fd in handover["sockets"].items()},
        restart=handover["restart"],
        folder=Path(handover["folder"]),
        kept=kept,
        report=report,
        like_torchserve=handover["like_torchserve"],
        log_file=handover["log_file"],
        family=handover["family"],
        fronts=handover.get("fronts"),
        orders_fd=handover.get("orders_fd", -1),
        is_successor=handover["is_successor"],
        keeps_sockets=handover["keeps_sockets"],
    )
    if start.orders_fd >= 0:
        os.set_inheritable(start.orders_fd, False)
    _stand_in(start.folder, own_folder.path)
    return start


def _stand_in(folder: Path, spare: Path | None) -> None:
    """Where the folder was deleted, see `launch.child_folder`, makes it again, or has another in its place.

    Logs, keys and snapshots lie in it unless it is said otherwise.
    """
    if Path.cwd() != Path("/") or folder == Path("/"):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
    except OSError:
        if spare is not None:
            os.chdir(spare)
