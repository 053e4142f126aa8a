"""Finds the handler of an unpacked archive and makes a `Service` of it, as tests of handlers do."""

from __future__ import annotations

import abc
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.service import Service
from ts.utils.util import list_classes_from_module

__all__ = [
    "MetricsCacheYamlImpl", "ModelLoader", "ModelLoaderFactory", "Service", "TsModelLoader", "list_classes_from_module",
]  # fmt: skip


class ModelLoaderFactory:
    """Where loaders come from."""

    @staticmethod
    def get_model_loader() -> TsModelLoader:
        """The one there is."""
        return TsModelLoader()


class ModelLoader(abc.ABC):
    """Loads models."""

    @abc.abstractmethod
    def load(  # noqa: PLR0917 - TorchServe's signature
        self, model_name: str, model_dir: str, handler: str | None = None, gpu_id: int | None = None,
        batch_size: int | None = None, envelope: str | None = None, limit_max_image_pixels: bool = True,
    ) -> Service:  # fmt: skip
        """A service for a model."""


class TsModelLoader(ModelLoader):
    """Loads a handler from a folder that is on sys.path, or a built-in one."""

    def load(  # noqa: PLR0917 - TorchServe's signature
        self, model_name: str, model_dir: str, handler: str | None = None, gpu_id: int | None = None,
        batch_size: int | None = None, envelope: str | None = None, limit_max_image_pixels: bool = True,
        metrics_cache: Any = None,
    ) -> Service:  # fmt: skip
        """A service whose handler has been initialized.

        Args:
            model_name: what it is served as.
            model_dir: the unpacked archive.
            handler: ``module``, ``module.py`` or ``module:function``.
            gpu_id: index, or None.
            batch_size: the largest batch.
            envelope: name of a module of `ts.torch_handler.request_envelope`.
            limit_max_image_pixels: whether pictures over Pillow's limit are refused.
            metrics_cache: what the handler finds as ``context.metrics``.

        Raises:
            ImportError: there is no such module, or envelope.
            ValueError: the module has neither that function nor one class, or the class has no ``handle``.
        """
        path = Path(model_dir, "MAR-INF", "MANIFEST.json")
        manifest = json.loads(path.read_text()) if path.is_file() else None
        file, _, function_name = (handler or "").partition(":")
        name = Path(file).name.removesuffix(".py")
        try:
            module = self._load_handler_file(name)
        except ImportError:
            module = self._load_default_handler(name)
        service = Service(
            model_name, model_dir, manifest, None, gpu_id, batch_size or 1, limit_max_image_pixels, metrics_cache
        )
        if hasattr(module, function_name or "handle"):
            entry_point, initialize = self._get_function_entry_point(module, function_name or "handle")
        else:
            entry_point, initialize = self._get_class_entry_point(module)
        service._entry_point = self._load_default_envelope(envelope)(entry_point).handle if envelope else entry_point
        initialize(service.context)
        return service

    def _load_handler_file(self, handler: str) -> ModuleType:
        return importlib.import_module(handler)

    def _load_default_handler(self, handler: str) -> ModuleType:
        return importlib.import_module(f"ts.torch_handler.{handler}")

    def _load_default_envelope(self, envelope: str) -> Any:
        module = importlib.import_module(f"ts.torch_handler.request_envelope.{envelope}")
        return list_classes_from_module(module)[0]

    def _get_function_entry_point(self, module: ModuleType, function_name: str) -> tuple[Any, Any]:
        function = getattr(module, function_name)
        return function, lambda context: function(None, context)

    def _get_class_entry_point(self, module: ModuleType) -> tuple[Any, Any]:
        classes = list_classes_from_module(module)
        if len(classes) != 1:
            raise ValueError(f"Expected only one class in custom service code or a function entry point {classes}")
        handler = classes[0]()
        if not hasattr(handler, "handle"):
            raise ValueError(f"Expect handle method in class {classes[0]}")
        return handler.handle, getattr(handler, "initialize", lambda context: None)
