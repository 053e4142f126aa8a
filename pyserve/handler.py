"""What handlers and the server agree on: the handler contract, and the names of the built-in handlers.

Handlers import this module and `pyserve.context` and nothing else of pyserve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pyserve.context import Context
from pyserve.errors import HandlerError, InputError, ModelLoadError

if TYPE_CHECKING:
    import torch

__all__ = ["BUILT_IN", "Handler", "HandlerError", "InputError", "ModelLoadError", "PredictionException"]

# Handler name -> (module, class) of those that come with pyserve.
BUILT_IN = {
    "base_handler": ("pyserve.handlers.base_handler", "BaseHandler"),
    "densenet_handler": ("pyserve.handlers.densenet_handler", "DenseNetHandler"),
    "image_classifier": ("pyserve.handlers.image_classifier", "ImageClassifier"),
    "image_segmenter": ("pyserve.handlers.image_segmenter", "ImageSegmenter"),
    "object_detector": ("pyserve.handlers.object_detector", "ObjectDetector"),
    "tensor": ("pyserve.handlers.tensor", "TensorHandler"),
    "text_classifier": ("pyserve.handlers.text_classifier", "TextClassifier"),
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
