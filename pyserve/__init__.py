"""pyserve: a serving engine for PyTorch models. The command line is in `pyserve.commands.cli`.

What it has is imported when it is first used: importing pyserve itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyserve.client import AnswerError, AsyncClient, Client
    from pyserve.embedding.engine import EmbeddedServer, embedded
    from pyserve.embedding.given_models import Model
    from pyserve.serving import Serving, ServingError, serve

__all__ = [
    "AnswerError", "AsyncClient", "Client", "EmbeddedServer", "Model", "Serving", "ServingError", "__version__",
    "embedded", "serve",
]  # fmt: skip

__version__ = "0.1.0"
TORCHSERVE_VERSION = "0.12.0"
"""Of the TorchServe whose contract is kept; what scripts and handlers compare with."""

_CLIENT = ("AnswerError", "AsyncClient", "Client")
_EMBEDDING = ("EmbeddedServer", "embedded")
_SERVING = ("Serving", "ServingError", "serve")


def __getattr__(name: str) -> Any:
    if name in _CLIENT:
        from pyserve import client

        return getattr(client, name)
    if name in _SERVING:
        from pyserve import serving

        return getattr(serving, name)
    if name in _EMBEDDING:
        from pyserve.embedding import engine

        return getattr(engine, name)
    if name == "Model":
        from pyserve.embedding.given_models import Model

        return Model
    if name == "asgi":
        return importlib.import_module("pyserve.asgi")
    raise AttributeError(f"module 'pyserve' has no attribute {name!r}")
