"""A supervisor's life around its loop: opens sockets, writes pid files and keys, and clears everything away.

Entry of the background process that ``pyserve start`` starts, and of what a supervisor becomes by an upgrade.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from pyserve import __version__, launch, log
from pyserve.config.config import Config
from pyserve.errors import ConfigError, JsonObject
from pyserve.fronts.shares import Shares
from pyserve.security import tls
from pyserve.security.exposure import exposure_notes
from pyserve.security.tokens import Tokens, key_file, notes_of
from pyserve.server import pid_file
from pyserve.server.console_file import ConsoleFile
from pyserve.server.control import Control
from pyserve.server.housekeeping import Housekeeping
from pyserve.server.image import CONTINUE, Image
from pyserve.server.kept_files import KeptFiles, SharedMemory
from pyserve.server.listeners import Listeners
from pyserve.server.own_folder import OwnFolder
from pyserve.server.passed_sockets import PassedSockets
from pyserve.server.supervisor import EXIT_FAILED, Supervisor
from pyserve.server.systemd import Systemd

logger = logging.getLogger("pyserve.supervisor")


def supervise(
    config: Config,
    on_event: Callable[[JsonObject], None],
    *,
    pid_path: Path,
    plain_pid_path: Path | None = None,
    log_file: str,
    program: launch.Program,
    drains_on_hangup: bool,
) -> int:
    """Open the sockets, write pid files and keys, run a server until it is stopped, and clear everything away.

    Raises:
        ConfigError: an address, the pid file, a certificate or the file of keys cannot be had.
    """
    own_folder, memory = OwnFolder(config.state_dir), SharedMemory()
    image = Image(config, own_folder, memory.descriptors, pid_path=pid_path, plain_pid_path=plain_pid_path,
                  log_file=log_file, drains_on_hangup=drains_on_hangup)  # fmt: skip
    kept = KeptFiles(own_folder, memory)
    pid_files = pid_file.PidFiles(pid_path, plain_pid_path)
    with contextlib.ExitStack() as at_end:
        _clear_at_end(at_end, image, memory, pid_files)
        notes = own_folder_notes(own_folder) + tls.prepare(config, own_folder.path)
        for name, content in tls.made_files(config).items():
            kept.put(name, content)
        if config.front_ends > 1:
            Shares.of(config)  # or it says why not
            if find_spec("pyserve._front") is None:
                raise ConfigError("front_ends: pyserve._front is not there; build pyserve's extensions again")
        image.listeners = Listeners.open(config, PassedSockets.of_environment())
        for name, address in image.listeners.addresses.items():
            setattr(config, f"{name}_address", address)
        notes += exposure_notes(config)
        image.control = Control()
        image.running = _running(config, image)
        notes += pid_files.write(image.running)
        folder = Path.cwd()
        tokens = Tokens.create(config, kept, folder)  # behind the pid file: another server's keys stay its own
        if tokens is not None:
            at_end.callback(tokens.discard)
        notes += notes_of(config, tokens)
        addresses = image.running.addresses
        logger.info("listening on %s", ", ".join(f"{address} ({name})" for name, address in addresses.items()))
        supervisor = _supervisor(image, memory, pid_files, lambda event: on_event(_with_notes(event, notes)), program)
        _keep_house(at_end, image, kept, pid_files)
        return supervisor.run()


def continue_as(handover: JsonObject) -> int:
    """Continue as the supervisor of this process, which was another program; see `Image`."""
    image = Image.of(handover)
    memory = SharedMemory(image.memory)
    kept = KeptFiles(image.own_folder, memory)
    pid_files = pid_file.PidFiles(image.pid_path, image.plain_pid_path)
    assert image.running is not None and image.control is not None
    pid_files.adopt(image.running)
    with contextlib.ExitStack() as at_end:
        _clear_at_end(at_end, image, memory, pid_files)
        tokens = Tokens.open(image.config, kept, image.folder)
        if tokens is not None:
            at_end.callback(tokens.discard)
        supervisor = _supervisor(image, memory, pid_files, lambda event: None,
                                 launch.Program(**handover["program"]), adopted=handover["supervisor"])  # fmt: skip
        _keep_house(at_end, image, kept, pid_files)
        logger.info("this is the supervisor of pyserve %s now", __version__)
        if handover["client"] >= 0:
            client = image.control.adopt(socket.socket(fileno=handover["client"]))
            client.tell("upgraded", pid=os.getpid(), version=__version__, note="")
            image.control.drop(client)
        return supervisor.run()


def _supervisor(
    image: Image, memory: SharedMemory, pid_files: pid_file.PidFiles, on_event: Callable[[JsonObject], None],
    program: launch.Program, *, adopted: JsonObject | None = None,
) -> Supervisor:  # fmt: skip
    running = image.running
    assert running is not None

    def on_grpc(grpc: dict[str, str]) -> None:
        image.running = replace(running, addresses={**running.addresses, **grpc})
        pid_files.update(image.running)

    service = Systemd.of_environment()
    if adopted:
        service.ready()  # the upgrade that began in the program before is over
    return Supervisor(
        image.config, image.listeners, image.own_folder, memory, on_event,
        program=program, drains_on_hangup=image.drains_on_hangup,
        like_torchserve=image.plain_pid_path is not None, log_file=image.log_file, on_grpc=on_grpc,
        control=image.control, service=service, image=image, adopted=adopted,
    )  # fmt: skip


def _running(config: Config, image: Image) -> pid_file.RunningServer:
    assert image.control is not None
    pid = os.getpid()
    started = pid_file.start_time(pid)
    assert started is not None
    return pid_file.RunningServer(
        pid, started, {name: str(address) for name, address in image.listeners.addresses.items()}, image.log_file,
        float(config.drain_delay_s + config.drain_timeout_s), str(key_file(config, Path.cwd()) or ""),
        config.model_store or "", image.control.address,
    )  # fmt: skip


def _clear_at_end(
    at_end: contextlib.ExitStack, image: Image, memory: SharedMemory, pid_files: pid_file.PidFiles
) -> None:
    """The last first: tokens and what comes later are cleared away before."""

    def close() -> None:
        image.listeners.close()
        if image.control is not None:
            image.control.close()

    at_end.callback(memory.close)
    at_end.callback(image.own_folder.remove)
    at_end.callback(close)
    at_end.callback(pid_files.remove, os.getpid())


def _keep_house(at_end: contextlib.ExitStack, image: Image, kept: KeptFiles, pid_files: pid_file.PidFiles) -> None:
    console = [ConsoleFile(Path(image.log_file)).look] if image.log_file else []
    keeping: list[Housekeeping] = []

    def start() -> None:
        keeping.append(Housekeeping([*console, kept.look, pid_files.look]))
        keeping[-1].start()

    def stop() -> None:
        keeping[-1].stop()

    start()
    image.pause, image.resume = stop, start
    at_end.callback(stop)


def own_folder_notes(own_folder: OwnFolder) -> list[tuple[str, str]]:
    """What the user should know of it at start: (``warning``, one line), or nothing."""
    if not own_folder.problem:
        return []
    place = f"state and keys lie in {own_folder.path}" if own_folder.path else "state and keys are in memory only"
    return [("warning", f"{place}, because {own_folder.problem}; name another folder with state_dir")]


def _with_notes(event: JsonObject, notes: list[tuple[str, str]]) -> JsonObject:
    """Reported together with the table, which is what people read."""
    return {**event, "notes": [*notes, *event.get("notes", [])]} if event["event"] == "ready" else event


def main() -> int:
    log.configure(logging.INFO, sys.stderr)
    handover, reporter = launch.receive(launch.SUPERVISOR_VARIABLE)
    config = Config.from_json(handover["config"])
    log.configure(config.log_level.upper(), sys.stderr, as_json=config.log_format == "json")
    if handover.get(CONTINUE):
        return _continue(handover, reporter)
    reporter.never_wait()

    def on_event(event: JsonObject) -> None:
        reporter.send(**event)
        if event["event"] in ("ready", "failed"):
            reporter.close()

    try:
        return supervise(
            config,
            on_event,
            pid_path=Path(handover["pid_file"]),
            plain_pid_path=Path(handover["plain_pid_file"]) if handover["plain_pid_file"] else None,
            log_file=handover["log_file"],
            program=launch.Program(**handover["program"]),
            drains_on_hangup=False,
        )
    except ConfigError as error:
        logger.error("%s", error)
        on_event({"event": "failed", "reason": str(error)})
        return EXIT_FAILED
    except Exception:
        logger.exception("the supervisor failed")
        return EXIT_FAILED


def _continue(handover: JsonObject, reporter: launch.Reporter) -> int:
    try:
        if handover["rehearses"]:
            Image.of(handover)
            reporter.send("rehearsed", version=__version__)
            return 0
        return continue_as(handover)
    except Exception as error:
        logger.exception("the supervisor failed")
        reporter.failed(f"{type(error).__name__}: {error}")
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
