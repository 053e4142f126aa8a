"""What handlers and the server agree on, and finding the handler an archive asks for.

Handlers import this module and `pyserve.context` and nothing else of pyserve.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pyserve.archive import Archive
from pyserve.context import Context
from pyserve.errors import HandlerError, InputError, ModelLoadError
from pyserve.manifest import BUILTIN_HANDLERS, split_handler

__all__ = [
    "BUILT_IN",
    "Handler",
    "HandlerError",
    "InputError",
    "ModelLoadError",
    "PredictionException",
    "load_handler",
]

# Handler name -> (module, class) of those that come with pyserve.
BUILT_IN = {
    "base_handler": ("pyserve.handlers.base_handler", "BaseHandler"),
    "image_classifier": ("pyserve.handlers.image_classifier", "ImageClassifier"),
    "tensor": ("pyserve.handlers.tensor", "TensorHandler"),
}


class PredictionException(Exception):
    """Raised by a handler to answer the request with its own text and status.

    Args:
        message: text of the answer.
        error_code: HTTP status.
    """

    def __init__(self, message: str, error_code: int = 500):
        super().__init__(message)
        self.message = message
        self.error_code = error_code

    def __str__(self) -> str:
        return f"{self.message} : {self.error_code}"


class Handler(Protocol):
    """What the server calls. `pyserve.handlers.base_handler.BaseHandler` explains each member."""

    context: Context | None
    device: torch.device | None
    sample_kind: str

    def initialize(self, context: Context) -> None: ...
    def prepare(self, context: Context) -> None: ...
    def example_input(self, context: Context) -> torch.Tensor: ...
    def is_quick(self, size: int) -> bool: ...
    def preprocess(self, data: Sequence[Any]) -> torch.Tensor: ...
    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any: ...
    def postprocess(self, data: Any) -> list[Any]: ...
    def handle(self, data: Sequence[Any], context: Context) -> list[Any]: ...


def load_handler(archive: Archive, named: str | None = None) -> Handler:
    """A new, not yet prepared handler: the one ``named``, by default the one the archive's manifest names.

    Raises:
        ModelLoadError: the archive brings handler code of its own, or names a handler that does not exist.
    """
    named = named or archive.manifest.handler
    name = split_handler(named)[0].removesuffix(".py").removeprefix("ts.torch_handler.")
    file = f"{name}.py"
    built_in = ", ".join(sorted(BUILT_IN))
    # The archive's own file comes first, as in TorchServe, also when it bears a built-in handler's name.
    if (archive.model_dir / file).is_file():
        raise ModelLoadError(
            f"{archive.name} brings its own handler code ({file}); that needs the python lane, which this version "
            f"does not have yet. Built-in handlers: {built_in}; repack with --handler and one of these names."
        )
    if name in BUILT_IN:
        module, cls = BUILT_IN[name]
        handler: Handler = getattr(importlib.import_module(module), cls)()
        return handler
    raise ModelLoadError(_unknown_handler_text(archive.name, named, name, built_in))


def _unknown_handler_text(archive_name: str, named: str, name: str, built_in: str) -> str:
    if name in BUILTIN_HANDLERS:
        return (
            f"{archive_name} asks for TorchServe's handler {name!r}, which this version does not have. "
            f"Built-in handlers: {built_in}."
        )
    nearest = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f", did you mean {nearest[0]!r}?" if nearest else "."
    repack = nearest[0] if nearest else f"path/to/{name}.py"
    return (
        f"{archive_name} asks for handler {named!r}, but holds no file {name}.py and there is no built-in handler of "
        f"that name{hint} Built-in handlers: {built_in}. Repack the archive with --handler {repack}."
    )
