"""The command line. Every import that takes time happens inside the command that needs it."""

from __future__ import annotations

import argparse
import atexit
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pyserve import __version__
from pyserve.commands.invocation import configured, guarded, overrides_of

EXIT_USAGE = 2

COMMANDS = {
    "start": "start a server, in the background unless --foreground",
    "stop": "drain the running server and stop it",
    "upgrade": "have this build of pyserve take the running server's place, without losing a request",
    "status": "say whether a server is running and how its models are",
    "top": "show the running server's models as they work: rates, queues, latencies",
    "bench": "load-test a model of the running server",
    "logs": "show the server's log",
    "predict": "send a file to a model of the running server",
    "deploy": "replace the served version of a model without downtime",
    "init": "make a folder with a handler, its settings, a test and a client to start from",
    "archive": "pack a model into an archive",
    "inspect": "show what is in an archive",
    "dev": "serve a folder, and reload its handler's code whenever it is saved",
    "debug": "call a model's handler in this terminal, so that breakpoint() works",
    "check": "try a model for what would fail once it is served",
    "tune": "measure an archive's model at many settings, and write down the best",
    "doctor": "look for what is wrong with this machine, or with an archive on it",
    "config": "show every setting, and where its value comes from",
    "example": "make an archive or a picture to try",
    "completion": "print a script by which a shell completes commands and flags",
}


class _Parser(argparse.ArgumentParser):
    """Errors are one line, whatever the sub-command."""

    def error(self, message: str) -> NoReturn:
        print(f"pyserve: error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors are one line on stderr, without a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["torchserve"], ["torch-model-archiver"]):
        return _in_torchserves_words(given[0], given[1:])
    atexit.register(gc.freeze)  # to look through torch's objects at the end takes 0.4 s, for nothing
    return guarded(lambda: _run(given), "pyserve")


def _in_torchserves_words(command: str, arguments: list[str]) -> int:
    """The commands that TorchServe's packages have too, wherever those were installed over ours."""
    if command == "torchserve":
        from pyserve.commands import torchserve

        return torchserve.main(arguments)
    from pyserve.commands import torch_model_archiver

    return torch_model_archiver.main(arguments)


def _run(arguments: list[str]) -> int:
    parser = _Parser(prog="pyserve", description="Serves PyTorch models over HTTP.")
    parser.add_argument("-v", "--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    wanted = next((each for each in arguments if not each.startswith("-")), None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == wanted:  # the others' arguments may live in modules that take time to import
            _add_arguments(name, command)
    if wanted is not None and wanted not in COMMANDS:
        flags = [each for each in arguments[: arguments.index(wanted)] if each.startswith("--")]
        unknown = [each for each in flags if each not in _options(parser)]
        if unknown:  # the word behind it is for it, perhaps
            parser.error(f"unknown argument {unknown[0]!r}{_nearest(unknown[0].lstrip('-'), COMMANDS)}")
        parser.error(f"unknown command {wanted!r}{_nearest(wanted, COMMANDS)}")
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        chosen = commands.choices[parsed.command] if parsed.command else parser
        chosen.error(f"unknown argument {unknown[0]!r}{_nearest(unknown[0].partition('=')[0], _options(chosen))}")
    if parsed.version:
        print(f"pyserve {__version__}")
        return 0
    if parsed.command is None:
        parser.print_help()
        return EXIT_USAGE
    return _command(parsed)


def _command(parsed: argparse.Namespace) -> int:
    match parsed.command:
        case "start":
            return _start(parsed)
        case "stop" | "status" | "deploy":
            return _served_command(parsed, _pid_path(parsed))
        case "archive":
            from pyserve.commands.archive import archive_command

            return archive_command(parsed)
        case "inspect":
            from pyserve.commands.inspect_archive import inspect_command

            return inspect_command(parsed)
        case "dev":
            from pyserve.commands.dev import dev_command

            return dev_command(parsed.folder, overrides_of(parsed), parsed)
        case "debug":
            from pyserve.commands.debug import debug_command

            return debug_command(parsed)
        case "check":
            from pyserve.commands.check import check_command

            return check_command(parsed)
        case "tune":
            from pyserve.commands.tune import tune_command

            return tune_command(parsed, _pid_path(parsed))
        case "doctor":
            from pyserve.commands.doctor import doctor_command

            return doctor_command(parsed)
        case "config":
            from pyserve.commands.config import config_command

            return config_command(overrides_of(parsed), parsed)
        case _:
            return _other_command(parsed)


def _served_command(parsed: argparse.Namespace, pid_path: Path) -> int:
    """Those on what was started, a server or a cluster."""
    from pyserve.commands.cluster import chosen_cluster

    cluster = chosen_cluster(parsed, pid_path)
    if cluster:
        from pyserve.commands.cluster import deploy_on_cluster, status_of_cluster, stop_cluster

        if parsed.command == "deploy":
            return deploy_on_cluster(parsed, cluster)
        if parsed.command == "stop":
            return stop_cluster(cluster, pid_path, parsed.timeout)
        return status_of_cluster(cluster, pid_path, as_json=parsed.json)
    match parsed.command:
        case "stop":
            from pyserve.commands.stop import stop_server

            return stop_server(pid_path, parsed.timeout)
        case "status":
            from pyserve.commands.status import print_status

            return print_status(pid_path, as_json=parsed.json)
        case _:
            from pyserve.commands.deploy import deploy_command

            return deploy_command(parsed, pid_path)


def _other_command(parsed: argparse.Namespace) -> int:
    """Those that start no server and try no model."""
    match parsed.command:
        case "upgrade":
            from pyserve.commands.upgrade import upgrade_server

            return upgrade_server(_pid_path(parsed))
        case "predict":
            from pyserve.commands.predict import predict_command

            return predict_command(parsed, _pid_path(parsed))
        case "bench":
            from pyserve.commands.bench import bench_command

            return bench_command(parsed, _pid_path(parsed))
        case "top":
            from pyserve.commands.top import top_command

            return top_command(parsed, _pid_path(parsed))
        case "logs":
            from pyserve.commands.logs import logs_command

            return logs_command(parsed, _pid_path(parsed))
        case "init":
            from pyserve.commands.init import init_command

            return init_command(parsed)
        case "completion":
            from pyserve.commands.completion import completion_command

            return completion_command(parsed.shell, COMMANDS, _parser_of)
        case _:
            from pyserve.commands.example import example_command

            return example_command(parsed)


def _parser_of(name: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"pyserve {name}")
    _add_arguments(name, parser)
    return parser


def _add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    match name:
        case "start":
            from pyserve.commands.cluster import add_start_arguments
            from pyserve.commands.model_arguments import MODEL_HELP, add_given_arguments

            parser.add_argument("model_paths", nargs="*", metavar="MODEL", help=f"{MODEL_HELP}; name=... names it")
            _add_start_arguments(parser)
            add_given_arguments(parser)
            add_start_arguments(parser)
        case "stop":
            _add_pid_file(parser)
            _add_cluster(parser)
            parser.add_argument("--timeout", type=float, metavar="S", help="how long to wait for it to drain, in s")
        case "status":
            _add_pid_file(parser)
            _add_cluster(parser)
            parser.add_argument("--json", action="store_true", help="as JSON")
        case "deploy":
            from pyserve.commands.deploy import add_deploy_arguments

            add_deploy_arguments(parser)
            _add_pid_file(parser)
            _add_cluster(parser)
        case "archive":
            from pyserve.commands.archive import add_archiver_arguments

            add_archiver_arguments(parser)
        case "inspect":
            from pyserve.commands.inspect_archive import add_inspect_arguments

            add_inspect_arguments(parser)
        case "dev":
            from pyserve.commands.dev import add_dev_arguments

            add_dev_arguments(parser)
            _add_address_arguments(parser)
            _add_pid_file(parser)
        case "debug":
            from pyserve.commands.debug import add_debug_arguments

            add_debug_arguments(parser)
        case "check":
            from pyserve.commands.check import add_check_arguments

            add_check_arguments(parser)
        case "tune":
            from pyserve.commands.tune import add_tune_arguments

            add_tune_arguments(parser)
            _add_pid_file(parser)
        case "doctor":
            from pyserve.commands.doctor import add_doctor_arguments

            add_doctor_arguments(parser)
        case "config":
            _add_start_arguments(parser)
            parser.add_argument("--json", action="store_true", help="as JSON")
        case _:
            _add_other_arguments(name, parser)


def _add_other_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    match name:
        case "upgrade":
            _add_pid_file(parser)
        case "predict":
            from pyserve.commands.predict import add_predict_arguments

            add_predict_arguments(parser)
            _add_pid_file(parser)
        case "bench":
            from pyserve.commands.bench import add_bench_arguments

            add_bench_arguments(parser)
            _add_pid_file(parser)
        case "top":
            from pyserve.commands.top import add_top_arguments

            add_top_arguments(parser)
            _add_pid_file(parser)
        case "logs":
            from pyserve.commands.logs import add_logs_arguments

            add_logs_arguments(parser)
            _add_pid_file(parser)
        case "init":
            from pyserve.commands.init import add_init_arguments

            add_init_arguments(parser)
        case "completion":
            from pyserve.commands.completion import add_completion_arguments

            add_completion_arguments(parser)
        case "example":
            from pyserve.commands.example import add_example_arguments

            add_example_arguments(parser)


def _add_pid_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pid-file", metavar="FILE", help="default: .pyserve.pid in the folder for temporary files")


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    from pyserve.commands.cluster import add_cluster_argument

    add_cluster_argument(parser)


def _add_start_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model-store", metavar="DIR", help="folder with the archives")
    add("--models", nargs="+", action="extend", metavar="MODEL",
        help="all, archive.mar, name=archive.mar or a path; repeatable")  # fmt: skip
    add("--foreground", action="store_true", help="stay, and log to the terminal; Ctrl-C drains")
    add("--strict", action="store_true",
        help="stop if a model cannot be loaded (exit code 3) or a key is not known (2)")  # fmt: skip
    add("--restore", action="store_true", help="serve what the newest snapshot in logs/config names, not --models")
    add("--no-config-snapshots", "--ncs", action="store_true", help="write no snapshots to logs/config")
    _add_address_arguments(parser)
    _add_pid_file(parser)
    ignored = parser.add_argument_group("accepted for TorchServe's sake")
    ignored.add_argument("--log-config", metavar="FILE")
    ignored.add_argument("--plugins-path", "--ppath", metavar="DIR")
    ignored.add_argument("--workflow-store", metavar="DIR")


def _add_address_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ts-config", metavar="FILE", help="a config.properties; $TS_CONFIG_FILE goes before it")
    add("--inference-address", metavar="ADDRESS", help="http://host[:port], https://host[:port] or unix:/path")
    add("--management-address", metavar="ADDRESS")
    add("--metrics-address", metavar="ADDRESS")
    add("--grpc", dest="enable_grpc", metavar="WHETHER", help="true, false or auto: if grpcio is installed (default)")
    add("--grpc-inference-port", metavar="PORT", help="default: 7070")
    add("--grpc-management-port", metavar="PORT", help="default: 7071")
    add("--token-file", metavar="FILE", help="keys that callers must show; default: made at start, where one is needed")
    add("--state-dir", metavar="DIR", help="for our own state; default: the user's runtime or state folder")
    add("--log-level", metavar="LEVEL", help="of the server's own records: error, warning, info (default) or debug")
    add("--request-log", metavar="WHETHER", help="true: a line on the console for each request, with the times of its "
        "stages; default: false, of dev true")  # fmt: skip
    add("--access-log", metavar="WHETHER", help="false: none in access_log.log; default: true")
    add("--front-ends", metavar="N", help="processes that accept connections; default: 1")
    add("--disable-token-auth", "--dt", action="store_true", help="no tokens, wherever the server listens")
    add("--enable-model-api", action="store_true", help="allow registering models, wherever the server listens")


def _start(parsed: argparse.Namespace) -> int:
    from pyserve.commands.model_arguments import UsageError, given_in, nothing_there, prepare_served
    from pyserve.commands.start import start_server
    from pyserve.config.config import MissingStoreError

    try:
        config = configured(parsed)
    except MissingStoreError as error:
        raise nothing_there(parsed.model_paths, error) from None
    if parsed.cluster:
        from pyserve.commands.cluster import start_on_cluster

        return start_on_cluster(parsed, config, _pid_path(parsed))
    from pyserve.commands.cluster import CLUSTER_FLAGS

    for name in (*CLUSTER_FLAGS, "timeout"):
        if getattr(parsed, name) is not None:
            raise UsageError(f"--{name.replace('_', '-').replace('resources', 'resource')} is for --cluster")
    config.notices += prepare_served(config, parsed.model_paths, given_in(parsed))
    return start_server(config, pid_path=_pid_path(parsed), foreground=parsed.foreground)


def _pid_path(parsed: argparse.Namespace) -> Path:
    from pyserve.server.pid_file import default_path

    return Path(parsed.pid_file) if parsed.pid_file else default_path()


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for option in parser._option_string_actions if option.startswith("--")]


def _nearest(name: str, known: Sequence[str] | dict[str, str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


if __name__ == "__main__":
    sys.exit(main())
