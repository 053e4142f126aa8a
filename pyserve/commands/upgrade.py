"""``pyserve upgrade``: the build of pyserve that runs this command takes the running server's place."""

from __future__ import annotations

import json
import select
import sys
from pathlib import Path

from pyserve import __version__, launch
from pyserve.commands import terminal as console
from pyserve.errors import JsonObject
from pyserve.os_errors import cause_of
from pyserve.server import control, pid_file


def upgrade_server(pid_path: Path) -> int:
    """Upgrade and return the exit code: 0 the new build serves; 1 the old one still does, or none did.

    Interrupted before the new server begins to accept, the old one continues as it was.

    Raises:
        ConfigError: the pid file cannot be trusted.
    """
    running = pid_file.read(pid_path)
    if running is None:
        print("pyserve is not currently running.")
        return 1
    if not running.control:
        return _failed("the running server is of a version that cannot be upgraded; stop it and start it again")
    try:
        sock = control.connect(running.control)
    except OSError as error:
        return _failed(f"the running server (pid {running.pid}) cannot be asked: {cause_of(error)}")
    with sock:
        sock.sendall(json.dumps({"do": "upgrade", "program": launch.Program.own()._asdict()}).encode() + b"\n")
        sock.setblocking(False)
        outcome = _wait_for_outcome(launch.ReportReader(sock.fileno()), notes := [])
    if outcome is None:
        return _failed("the server's supervisor ended before it said how the upgrade went; see its log")
    if outcome["event"] == "failed":
        return _failed(f"{outcome.get('reason')}. The running server was left as it was")
    if outcome.get("note"):
        notes.append(str(outcome["note"]))
    console.warn(notes)
    print(f"pyserve {outcome.get('version')} serves (pid {outcome.get('pid')})")
    return 0


def _wait_for_outcome(reader: launch.ReportReader, notes: list[str]) -> JsonObject | None:
    """The last event; None if there was none. What is to be known beside it is put into ``notes``."""
    print(f"upgrading to pyserve {__version__} ({Path(sys.executable)})", file=sys.stderr)
    step_count = 0
    with console.Progress() as progress:
        while not reader.at_end:
            select.select([reader.fd], [], [])
            for event in reader.read():
                if event["event"] == "progress":
                    progress.update(str(event.get("model")), str(event.get("text")))
                elif event["event"] == "step":
                    step_count += 1
                    progress.update(f"step {step_count}", str(event.get("text")))
                elif event["event"] == "note":
                    notes.append(str(event.get("text")))
                elif event["event"] in ("failed", "upgraded"):
                    return event
    return None


def _failed(reason: str) -> int:
    print(f"pyserve: error: {reason}", file=sys.stderr)
    return 1
