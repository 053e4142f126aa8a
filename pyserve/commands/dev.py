"""``pyserve dev``: serves a folder in the foreground, and reloads its handler's code whenever it is saved.

It is the server of ``pyserve start``, told to watch. A folder without a manifest is served with one that is made up
for it; nothing is written into the folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from pyserve.archive.archive import survey
from pyserve.archive.given import Given, given_for
from pyserve.archive.manifest import Manifest, check_model_name, name_of_file, split_handler
from pyserve.commands import terminal as console
from pyserve.commands.model_arguments import MODEL_HELP, add_given_arguments, given_in, prepare
from pyserve.commands.start import start_server
from pyserve.config.config import load_config
from pyserve.errors import ConfigError

COMMAND = "pyserve dev"


def add_dev_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``pyserve dev`` that ``pyserve start`` has not."""
    parser.add_argument("folder", metavar="MODEL", type=Path,
        help="a folder with handler.py, its weights and anything else it needs; or a model that has no code to watch: "
        f"{MODEL_HELP}")  # fmt: skip
    add_given_arguments(parser)
    parser.add_argument("--name", metavar="NAME", help="to serve it under; default: the manifest's, or the folder's")


def dev_command(folder: Path, overrides: Mapping[str, tuple[str, str]], parsed: argparse.Namespace) -> int:
    """Serves until Ctrl-C. Returns the exit code.

    Raises:
        ServeError: there is no such folder, or it cannot be told what is what in it.
    """
    from pyserve.server import pid_file

    manifest = open_folder(folder, given_in(parsed))
    name = parsed.name or manifest.model_name or name_of_file(folder.resolve().name)
    overrides = {
        "request_log": ("true", COMMAND),
        **overrides,
        "load_models": (model_to_load(folder, name), COMMAND),
        "watch": ("true", COMMAND),
        "enable_model_api": ("true", COMMAND),
        # The folder is what is served, now and here.
        "restore": ("false", COMMAND),
        "model_snapshot": ("", COMMAND),
        "no_config_snapshots": ("true", COMMAND),
    }
    warnings: list[str] = []
    try:
        config = load_config(overrides, ts_config=parsed.ts_config, warnings=warnings)
    finally:
        console.warn(warnings)
    module = split_handler(manifest.handler)[0].removesuffix(".py")
    if not folder.is_dir():
        config.notices.append(f"{folder.name} is a file: its code is not watched; unpack it into a folder for that")
    elif not any(folder.rglob(f"{module}.py")):
        config.notices.append(f"{manifest.handler} is built in: there is no handler code to watch")
    pid_path = Path(parsed.pid_file) if parsed.pid_file else pid_file.default_path()
    return start_server(config, pid_path=pid_path, foreground=True)


def open_folder(folder: Path, given: Given) -> Manifest:
    """The manifest of a folder, archive or model's file; what is made up of it, and printed, if there is none.

    Raises:
        ModelNotFoundError: there is no such folder.
        InvalidModelError: it is no model.
    """
    console.warn(prepare(folder, given), kind="note")
    text = given_for(folder).manifest.encode()
    if text:
        return Manifest.parse(text, json.dumps(folder.name))
    with survey(folder) as found:
        return found.manifest


def model_to_load(folder: Path, name: str) -> str:
    """The value of ``load_models``.

    Raises:
        ConfigError: the folder's name cannot stand there.
    """
    check_model_name(name)
    path = str(folder.absolute())
    if "," in path:
        raise ConfigError(f"{path} has a comma in it, which separates models; rename the folder")
    return f"{name}={path}"
