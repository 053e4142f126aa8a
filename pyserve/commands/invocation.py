"""What the commands share: the exit code of what they raise, and the configuration that their flags make."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyserve.config.config import Config

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130

_OVERRIDES = {
    "model_store": "--model-store",
    "inference_address": "--inference-address",
    "management_address": "--management-address",
    "metrics_address": "--metrics-address",
    "token_file": "--token-file",
    "state_dir": "--state-dir",
    "front_ends": "--front-ends",
    "enable_grpc": "--grpc",
    "grpc_inference_port": "--grpc-inference-port",
    "grpc_management_port": "--grpc-management-port",
    "log_level": "--log-level",
    "request_log": "--request-log",
    "access_log": "--access-log",
}
_SWITCHES = {
    "disable_token_auth": "disable_token_authorization",
    "enable_model_api": "enable_model_api",
    "strict": "strict",
    "restore": "restore",
    "no_config_snapshots": "no_config_snapshots",
}
_IGNORED = {
    "log_config": "--log-config is ignored: log4j2 files configure Java",
    "cpp_log_config": "--cpp-log-config is ignored: there is no C++ backend to log for",
    "plugins_path": "--plugins-path is ignored: plug-ins are Java archives",
    "workflow_store": "--workflow-store is ignored: workflows are not available in this version",
}


def guarded(run: Callable[[], int], name: str) -> int:
    """Run a command called ``name``: its exit code, also of what it raises."""
    from pyserve.commands.escaping import escaped_output

    with escaped_output():
        return _guarded(run, name)


def _guarded(run: Callable[[], int], name: str) -> int:
    try:
        code = run()
        _flush()
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone
        _write_no_more()
        return EXIT_ERROR
    except Exception as error:
        from pyserve.errors import ServeError

        if not isinstance(error, ServeError | OSError):
            raise
        text = " ".join(str(error).split())
        if "temporary directory" in text:
            text += "; set TMPDIR to a folder that can be written"
        elif isinstance(error, FileNotFoundError) and not error.filename:
            text += "; does the current folder still exist? If not, cd to one that does"
        print(f"{name}: error: {text}", file=sys.stderr)
        return int(getattr(error, "exit_code", EXIT_ERROR))


def _flush() -> None:
    """Raises OSError: the output cannot be written; at exit that would be a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        _write_no_more()
        raise


def _write_no_more() -> None:
    """What is left of the output goes nowhere, at exit too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def configured(parsed: argparse.Namespace) -> Config:
    """The configuration of a command that starts a server; what is wrong with it goes to stderr.

    Raises:
        ConfigError: it cannot be used.
    """
    from pyserve.archive.limits import use_limits
    from pyserve.commands import terminal as console
    from pyserve.config.config import load_config

    warnings: list[str] = []
    try:
        config = load_config(overrides_of(parsed), ts_config=parsed.ts_config, warnings=warnings)
    finally:
        # Told even when the configuration cannot be used: a misspelt key may be the reason why.
        console.warn(warnings)
    use_limits(config)
    config.notices += [text for name, text in _IGNORED.items() if getattr(parsed, name, None)]
    return config


def overrides_of(parsed: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Key of the configuration -> (text, flag), of what the command line says."""
    given = vars(parsed)
    overrides = {key: (given[key], flag) for key, flag in _OVERRIDES.items() if given.get(key) is not None}
    named = [*(given.get("model_paths") or ()), *(given.get("models") or ())]
    if named:
        overrides["load_models"] = (",".join(named), "--models")
    for name, key in _SWITCHES.items():
        if given.get(name):
            overrides[key] = ("true", f"--{name.replace('_', '-')}")
    return overrides
