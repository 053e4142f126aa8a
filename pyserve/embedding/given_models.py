"""The models that an engine is given in Python: paths, names of the model store, URLs, and modules of torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyserve.archive.given import Given
from pyserve.commands.model_arguments import prepare
from pyserve.config.archive_url import is_url
from pyserve.config.model_source import ModelSource, resolve_models
from pyserve.errors import ServeError
from pyserve.held_folder import make_held, remove_unheld
from pyserve.serving import ServingError, as_tuple, input_texts, written_module

if TYPE_CHECKING:
    import torch

_PREFIX = "pyserve-embedded-"


@dataclass(frozen=True)
class Model:
    """A model with what its file does not say.

    Attributes:
        source: the path of an archive, a folder or a model's file, a name in the model store, a URL; or a module, which
            is exported as it is in eval mode.
        name: by default that of its manifest, or the module's class in lower case.
        example: what a module is called with: a tensor, or one for each input, with the batch as first dimension.
        handler: of a file by itself: a built-in one, or the path of a Python file.
        labels, model_file, config_file: of a file by itself: paths, as for ``pyserve start``.
    """

    source: torch.nn.Module | str | os.PathLike[str]
    name: str | None = None
    example: torch.Tensor | Sequence[torch.Tensor] | None = None
    handler: str = "tensor"
    labels: str | None = None
    model_file: str | None = None
    config_file: str | None = None


AnyModel = Any  # torch.nn.Module | str | os.PathLike[str] | Model


class ModuleFolder:
    """The files that modules are written to. Removed by `close`, or by the next engine after a crash."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._descriptor = -1

    def new(self) -> Path:
        """A folder for one module."""
        if self.path is None:
            base = Path(tempfile.gettempdir())
            remove_unheld(base, _PREFIX)
            self.path, self._descriptor = make_held(base, _PREFIX)
        return Path(tempfile.mkdtemp(dir=self.path))

    def close(self) -> None:
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._descriptor)
            self.path = None


def sources_of(models: Sequence[AnyModel], store: str | None, folder: ModuleFolder) -> list[ModelSource]:
    """Where each model lies; modules are exported, and what was given is kept until its file is opened. Blocks.

    Raises:
        ServingError: one cannot be had; names it.
    """
    return [source for model in models for source in _sources(model, store, folder)]


def source_of(model: AnyModel, store: str | None, folder: ModuleFolder) -> ModelSource:
    """`sources_of` one that is no list.

    Raises:
        ServingError: as there, and if it means several.
    """
    found = _sources(model, store, folder)
    if len(found) != 1:
        raise ServingError(f"{model!r} means {len(found)} models; give one")
    return found[0]


def _sources(model: AnyModel, store: str | None, folder: ModuleFolder) -> list[ModelSource]:
    given = model if isinstance(model, Model) else Model(model)
    if not isinstance(given.source, str | os.PathLike):
        return [_of_module(given, folder)]
    try:
        if isinstance(given.source, os.PathLike):
            found = [ModelSource(None, str(Path(given.source).expanduser().absolute()))]
        else:
            found = resolve_models(given.source, store)
    except ValueError as error:
        raise ServingError(str(error)) from None
    if given.name is not None:
        found = [each._replace(name=given.name) for each in found]
    if not found:
        raise ServingError(f"models: {given.source!r} names no model")
    for each in found:
        if not is_url(each.path_or_file):
            _prepare(Path(each.path_or_file), given)
    return found


def _of_module(given: Model, folder: ModuleFolder) -> ModelSource:
    name = given.name or type(given.source).__name__.lower()
    examples = None if given.example is None else as_tuple(given.example)
    path = written_module(given.source, folder.new(), examples, name)
    _prepare(path, given, () if path.suffix == ".pt2" or examples is None else input_texts(examples))
    return ModelSource(name, str(path))


def _prepare(path: Path, given: Model, inputs: Sequence[str] = ()) -> None:
    if not inputs and given.example is not None and path.is_file() and path.suffix == ".pt":
        inputs = input_texts(as_tuple(given.example))
    said = Given(
        handler="" if given.handler == "tensor" else given.handler, inputs=tuple(inputs),
        model_file=_absolute(given.model_file), labels=_absolute(given.labels),
        config_file=_absolute(given.config_file),
    )  # fmt: skip
    try:
        prepare(path, said)
    except ServeError as error:
        raise ServingError(error.message) from error


def _absolute(path: str | None) -> str:
    return str(Path(path).expanduser().absolute()) if path else ""
