"""The command ``torchserve``: TorchServe's flags, texts and habits, for scripts that were written for it.

It differs from ``pyserve start`` in what scripts rely on: the log goes to the standard output of the command also after
it has returned, the pid stands in ``.model_server.pid`` too, and the process that runs on has TorchServe's name among
its arguments, by which SageMaker's toolkit finds it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from pyserve import TORCHSERVE_VERSION, __version__
from pyserve.commands.invocation import configured, guarded
from pyserve.errors import ConfigError
from pyserve.server import pid_file

STOP_FOREGROUND_S = 60.0
_STARTED = "TorchServe is already running, please use torchserve --stop to stop TorchServe."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``torchserve`` and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _run(given), "torchserve")


def _run(arguments: list[str]) -> int:
    parsed = _parser().parse_args(arguments)
    if parsed.version:
        print(f"TorchServe Version is {TORCHSERVE_VERSION}")
        print(f"this is pyserve {__version__}", file=sys.stderr)
        return 0
    return _stop(parsed.foreground) if parsed.stop else _start(parsed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="torchserve", description="Serves PyTorch models, with TorchServe's flags.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("-v", "--version", action="store_true", help="print the version and exit")
    action.add_argument("--start", action="store_true", help="start the server; the default. Its log goes "
        "to this command's standard output: `torchserve --start | tee log` ends when the server does; write "
        "`torchserve --start > log`")  # fmt: skip
    action.add_argument("--stop", action="store_true", help="drain the running server and stop it")
    add = parser.add_argument
    add("--ts-config", metavar="FILE", help="a config.properties; $TS_CONFIG_FILE goes before it")
    add("--model-store", metavar="DIR", help="folder with the archives")
    add("--workflow-store", metavar="DIR", help="ignored")
    add("--models", nargs="+", metavar="MODEL", help="all, archive.mar, name=archive.mar, name=URL; or comma-joined")
    add("--log-config", metavar="FILE", help="ignored")
    add("--cpp-log-config", metavar="FILE", help="ignored")
    add("--foreground", action="store_true", help="stay; with --stop, wait at most a minute")
    add("--no-config-snapshots", "--ncs", action="store_true", help="write no snapshots to logs/config")
    add("--plugins-path", "--ppath", metavar="DIR", help="ignored")
    add("--disable-token-auth", "--dt", action="store_true", help="no tokens, wherever the server listens")
    add("--enable-model-api", action="store_true", help="allow registering models, wherever the server listens")
    return parser


def _start(parsed: argparse.Namespace) -> int:
    from pyserve.commands.start import start_server

    pid_path = pid_file.default_path()
    running = pid_file.read(pid_path)
    if running is not None:
        print(f"{_STARTED} (pid {running.pid}, {running.addresses.get('inference', 'address unknown')})")
        return 1
    return start_server(configured(parsed), pid_path=pid_path, foreground=parsed.foreground, like_torchserve=True)


def _stop(foreground: bool) -> int:
    from pyserve.commands.stop import stop_server

    pid_path = pid_file.default_path()
    if pid_file.read(pid_path) is not None:
        return stop_server(pid_path, STOP_FOREGROUND_S if foreground else None, name="TorchServe",
                           command="torchserve --stop")  # fmt: skip
    print("TorchServe is not currently running.")
    _remove_key_file(Path("key_file.json"))
    return 0


def _remove_key_file(path: Path) -> None:
    """The keys of a server that ended without clearing up; one that stops in good order takes its own away."""
    from pyserve.security.tokens import read_keys

    with contextlib.suppress(ConfigError):  # it holds something else, and is left alone
        if path.is_file() and path.read_bytes()[:1] == b"{" and read_keys(path):
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
