"""The models that a command is given, by one rule: an archive, a folder, or a model's file by itself, in any mix.

What a file does not say about itself is given by name: ``--input float32:3,224,224 --handler image_classifier``. It
reaches all processes that open the file (`pyserve.archive.given`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from pyserve.archive.archive import has_manifest, survey
from pyserve.archive.bare_file import input_unknown, is_input
from pyserve.archive.folder_manifest import infer_manifest
from pyserve.archive.given import Given, give
from pyserve.archive.limits import configured_limits
from pyserve.archive.program_inputs import inputs_in
from pyserve.archive.weights import Weights
from pyserve.config.archive_url import is_url
from pyserve.config.config import Config
from pyserve.config.model_source import ARCHIVE_SUFFIXES, ModelSource, resolve_models
from pyserve.errors import ConfigError, InvalidModelError, ModelNotFoundError, ServeError
from pyserve.handler import BUILT_IN


class UsageError(ConfigError):
    """What was asked for on the command line does not go together.

    Attributes:
        exit_code: of the command.
    """

    exit_code = 2


MODEL_HELP = (
    "an archive (.mar, .tar.gz), a folder, or a model's file: TorchScript (.pt), torch.export or AOTInductor (.pt2), "
    "or weights (.pth, .safetensors) with --model-file"
)


def add_given_arguments(parser: argparse.ArgumentParser, *, takes_bodies: bool = False) -> None:
    """What a model's file does not say about itself.

    Args:
        takes_bodies: ``--input`` is there already, and takes files to send too.
    """
    group = parser.add_argument_group("about a model's file that is given by itself")
    if not takes_bodies:
        group.add_argument("--input", action="append", default=[], metavar="DTYPE:SHAPE",
            help="one item of an input, without the batch: float32:3,224,224; -1 is any size, 2..64 a range; of "
            "several inputs each with a name: ids=int64:2..64; read from the file where it has it")  # fmt: skip
    group.add_argument("--handler", metavar="NAME", help="built-in (default: tensor), or a Python file[:function]")
    group.add_argument("--model-file", metavar="FILE", help="Python file with the model's class, for weights")
    group.add_argument("--labels", metavar="FILE", help="index_to_name.json of image_classifier: the names of classes")
    group.add_argument("--config-file", metavar="FILE", help="a model-config.yaml")


def given_in(parsed: argparse.Namespace) -> Given:
    """What the command line says; ``--input`` that names a file to send is not among it."""
    said = vars(parsed)
    texts = [str(each) for each in said.get("input") or ()]
    return Given(
        handler=said.get("handler") or "",
        inputs=tuple(text for text in texts if is_input(text) or "json_body" not in said),
        model_file=_absolute(said.get("model_file")),
        labels=_absolute(said.get("labels")),
        config_file=_absolute(said.get("config_file")),
    )


def _absolute(path: str | None) -> str:
    return str(Path(path).absolute()) if path else ""


def prepare(path: Path, given: Given, *, needs_input: bool = True) -> list[str]:
    """Has all processes open ``path`` with what was given, or with what can be told of a folder without a manifest.

    Args:
        needs_input: it is going to be called, so that its inputs must be known.

    Returns:
        What was taken for granted, a line each.

    Raises:
        ModelNotFoundError: there is no such file; the text names the nearest.
        InvalidModelError, ConfigError: it is no model, or what was given is not for it; the text says what to type.
    """
    if not path.exists():
        raise not_there(path)
    if path.is_dir():
        return _prepare_folder(path, given)
    file, colon, function = given.handler.partition(":")
    if given.handler not in BUILT_IN and any(Path(each).is_file() for each in (file, f"{file}.py")):
        given = Given(**{**given.__dict__, "handler": f"{_absolute(file)}{colon}{function}"})
    notes: list[str] = []
    give(path, given)
    with survey(path) as found:
        if found.kind in ("zip", "tar", "tar.gz"):
            give(path, Given())
            if given != Given():
                raise ConfigError(
                    f"{path.name} is an archive, which says itself what it needs; --input, --handler, --labels, "
                    "--model-file and --config-file are for a model's file by itself: leave them out, or pack again"
                )
            return []
        manifest, config = found.manifest, found.config
    if given.model_file and manifest.model_file is None and needs_input:
        notes.append(f"{path.name}: its code is in it; --model-file is not used")
    is_unsaid = needs_input and manifest.handler == "tensor" and config.raw.get("input") is None
    if is_unsaid and not _says_inputs(path, manifest.model_file):
        raise InvalidModelError(f"{path.name}: {input_unknown(path.name)}")
    return [f"{path.name}: {found.kind}; served as {manifest.model_name} with handler {manifest.handler}", *notes]


def _says_inputs(path: Path, model_file: str | None) -> bool:
    """Whether nothing has to be given; of exported programs, which always say it, without looking."""
    if model_file is not None:
        return False
    with survey(path) as found:
        if found.kind != "TorchScript":
            return True
    return inputs_in(Weights("m.pt", path, 0, path.stat().st_size), path.name, configured_limits()) is not None


def _prepare_folder(folder: Path, given: Given) -> list[str]:
    others = Given(**{**given.__dict__, "handler": ""})
    if has_manifest(folder):
        if given != Given():
            raise ConfigError(f"{folder.name} has a manifest, which says what it needs; --input, --handler, --labels, "
                              "--model-file and --config-file are for a model's file by itself")  # fmt: skip
        return []
    if others != Given():
        raise ConfigError(f"{folder.name} is a folder: put the model's class into model.py there, labels into "
                          "index_to_name.json, and input: into model-config.yaml, in place of flags")  # fmt: skip
    inferred = infer_manifest(folder, given.handler)
    give(folder, Given(manifest=inferred.text.decode()))
    return [inferred.said]


def prepare_all(paths: Iterable[Path], given: Given) -> list[str]:
    """`prepare`, of several. What was given is for those that are no archives; one of them must be there."""
    paths = list(paths)
    plain = [path for path in paths if path.is_file() and not _is_archive(path)]
    if given != Given() and not plain and len(paths) != 1:
        raise ConfigError("--input, --handler, --labels, --model-file and --config-file are for a model's file by "
                          "itself, and none is given")  # fmt: skip
    return [note for path in paths for note in prepare(path, given if path in plain or len(paths) == 1 else Given())]


def prepare_served(config: Config, named: Sequence[str], given: Given) -> list[str]:
    """`prepare_all`, of what a server is to load.

    Args:
        named: models that must be there, as they stand on the command line; others are left for the server to report.

    Raises:
        ServeError: one of ``named`` is not there or no model, or a model's file by itself lacks something.
    """
    typed = {Path(each.path_or_file) for each in _sources(",".join(named), config.model_store)}
    paths = []
    for source in _sources(config.load_models, config.model_store):
        path = Path(source.path_or_file)
        if path in typed and not path.exists():
            raise not_there(next((Path(text) for text in named if Path(text).absolute() == path), path))
        is_silent = path.is_dir() and not has_manifest(path)
        if path in typed or is_silent or (path.is_file() and not _is_archive(path)):
            paths.append(path)
    try:
        return prepare_all(paths, given)
    except ServeError:
        if typed or given != Given() or config.origin.get("load_models") == "--models":
            raise
        return []  # one line of a configuration; the server reports it beside the others


def _sources(models: str, store: str | None) -> list[ModelSource]:
    """Of a list of models, the files and folders that it names one by one."""
    parts = [part for part in models.split(",") if part.strip().lower() != "all"]
    return [each for each in resolve_models(",".join(parts), store) if not is_url(each.path_or_file)]


def _is_archive(path: Path) -> bool:
    return path.name.endswith(ARCHIVE_SUFFIXES)


def nothing_there(named: Sequence[str], error: ServeError) -> ServeError:
    """What to raise in place of ``error``, which misses a model store, if the reason is a model that is not there."""
    missing = [path for path in (Path(text.partition("=")[2] or text) for text in named) if not path.exists()]
    return not_there(missing[0]) if missing else error


def not_there(path: Path) -> ModelNotFoundError:
    """The error for a path where nothing is, with what may have been meant."""
    if path.is_symlink():
        return ModelNotFoundError(
            f"Model not found at: {path}; it is a link to {os.readlink(path)}, which is not there"
        )
    try:
        names = [each.name for each in path.parent.iterdir() if not each.name.startswith(".")]
    except OSError:
        return ModelNotFoundError(f"Model not found at: {path}; there is no folder {path.parent}")
    near = get_close_matches(path.name, names, n=1) or [
        name for name in sorted(names) if name.partition(".")[0] == path.name
    ]
    where = "the current folder" if str(path.parent) == "." else path.parent
    fix = f"did you mean {path.parent / near[0]}?" if near else f"{where} has no such file"
    return ModelNotFoundError(f"Model not found at: {path}; {fix}")
