"""Handlers in the form of years ago: a class with a method per step."""

from __future__ import annotations

import abc
from typing import Any


class ModelService(abc.ABC):
    """A model that is asked with `handle`.

    Args:
        model_name: what it is served as.
        model_dir: folder of its files.
        manifest: MANIFEST.json as a dict.
        gpu: index, or None.
    """

    def __init__(self, model_name: str, model_dir: str, manifest: dict[str, Any], gpu: int | None = None):
        self.model_name = model_name
        self.model_dir = model_dir
        self.manifest = manifest
        self.gpu = gpu
        self.context: Any = None

    def initialize(self, context: Any) -> None:
        """Keeps the context."""
        self.context = context

    @abc.abstractmethod
    def inference(self, data: Any) -> Any:
        """The answer for one input."""

    def ping(self) -> Any:
        """For those that tell whether they are well."""
        return None

    def signature(self) -> Any:
        """For those that tell what they take."""
        return None

    def handle(self, data: Any, context: Any) -> Any:
        """Called for each batch."""
        raise NotImplementedError("handle is for the handler to define")


class SingleNodeService(ModelService):
    """Preprocess, inference and postprocess in a row."""

    def inference(self, data: Any) -> Any:
        """All three."""
        return self._postprocess(self._inference(self._preprocess(data)))

    @abc.abstractmethod
    def _inference(self, data: Any) -> Any:
        return data

    def _preprocess(self, data: Any) -> Any:
        return data

    def _postprocess(self, data: Any) -> Any:
        return data
