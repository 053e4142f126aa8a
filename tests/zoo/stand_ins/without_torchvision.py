"""Lets timm and segmentation-models-pytorch be imported where there is no torchvision.

They name classes of it when they are imported, and use them only in models that are made of torchvision's. Each name
becomes an empty module class; nothing happens where torchvision is installed. Afterwards it is absent again, since
transformers looks for it too.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Named(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


class _Constants(type):
    """Classes with constants such as InterpolationMode.NEAREST."""

    def __getattr__(cls, name: str) -> str:
        if not name.isupper():
            raise AttributeError(name)
        return name


class _Named(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            made: Any = _Constants(name, (torch.nn.Module,), {"__module__": self.__name__})
        else:
            made = _Named(f"{self.__name__}.{name}")
            made.__path__ = []
        setattr(self, name, made)
        return made


@contextmanager
def stand_in() -> Iterator[None]:
    """While it lasts, any name can be imported from torchvision."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
