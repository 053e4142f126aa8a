"""What handlers call while they handle."""

from __future__ import annotations

import importlib
from typing import Any

from pyserve.worker.streaming import send_intermediate_predict_response

__all__ = ["create_predict_response", "import_class", "send_intermediate_predict_response"]


def import_class(class_name: str, module_prefix: str | None = None) -> type:
    """The class ``module.Class``, looked for in ``module_prefix`` if it is given.

    Raises:
        ImportError: there is none.
    """
    module_name, _, name = class_name.rpartition(".")
    if module_prefix:
        module_name = f"{module_prefix}.{module_name}" if module_name else module_prefix
    found = getattr(importlib.import_module(module_name), name, None)
    if not isinstance(found, type):
        raise ImportError(f"{module_name} has no class {name}")
    return found


def create_predict_response(*args: Any, **kwargs: Any) -> bytes:
    """Refuses: it speaks TorchServe's wire between its processes, which pyserve does not have."""
    raise NotImplementedError("create_predict_response speaks TorchServe's wire, which pyserve does not have")
