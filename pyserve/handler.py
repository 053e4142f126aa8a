"""What handlers and the server agree on: the handler contract, and the names of the built-in handlers.

Handlers import this module and `pyserve.context` and nothing else of pyserve.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from pyserve.context import Context
from pyserve.errors import HandlerError, InputError, ModelLoadError

if TYPE_CHECKING:
    import torch

__all__ = ["BUILT_IN", "Handler", "HandlerError", "InputError", "ModelLoadError", "PredictionException"]


class BuiltIn(NamedTuple):
    """A handler that comes with pyserve.

    Attributes:
        module: where its class is defined.
        class_name: the name of its class.
        lane: where the model runs of an archive that names it: ``native`` (threads of the server), or ``python``
            (worker processes) for those that call the model in Python: a network that takes lists, or one that writes
            its own answer.
    """

    module: str
    class_name: str
    lane: Literal["native", "python"]

    def import_class(self) -> Any:
        """Its class. Imports torch."""
        return getattr(importlib.import_module(self.module), self.class_name)


# The one list of them, by the name that a manifest gives.
BUILT_IN = {
    "base_handler": BuiltIn("pyserve.handlers.base_handler", "BaseHandler", "native"),
    "densenet_handler": BuiltIn("pyserve.handlers.densenet_handler", "DenseNetHandler", "python"),
    "image_classifier": BuiltIn("pyserve.handlers.image_classifier", "ImageClassifier", "native"),
    "image_segmenter": BuiltIn("pyserve.handlers.image_segmenter", "ImageSegmenter", "native"),
    "object_detector": BuiltIn("pyserve.handlers.object_detector", "ObjectDetector", "python"),
    "tensor": BuiltIn("pyserve.handlers.tensor", "TensorHandler", "native"),
    "text_classifier": BuiltIn("pyserve.handlers.text_classifier", "TextClassifier", "python"),
}

# TorchServe's other handlers -> the package that each is a cover of.
NOT_BUILT_IN = {
    "dali_image_classifier": "nvidia-dali",
    "trt_llm_handler": "tensorrt_llm",
    "vllm_handler": "vllm",
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
    def example_input(self, context: Context) -> torch.Tensor | tuple[torch.Tensor, ...]: ...
    def is_quick(self, size: int) -> bool: ...
    def preprocess(self, data: Sequence[Any]) -> Any: ...
    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any: ...
    def postprocess(self, data: Any) -> list[Any]: ...
    def handle(self, data: Sequence[Any], context: Context) -> list[Any]: ...
