"""pyserve: a serving engine for PyTorch models. The command line is in `pyserve.commands.cli`.

`serve`, `Client` and `AsyncClient` are imported when they are first used: importing pyserve itself costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyserve.client import AnswerError, AsyncClient, Client
    from pyserve.serving import Serving, ServingError, serve

__all__ = ["AnswerError", "AsyncClient", "Client", "Serving", "ServingError", "__version__", "serve"]

__version__ = "0.1.0"
TORCHSERVE_VERSION = "0.12.0"
"""Of the TorchServe whose contract is kept; what scripts and handlers compare with."""

_CLIENT = ("AnswerError", "AsyncClient", "Client")
_SERVING = ("Serving", "ServingError", "serve")


def __getattr__(name: str) -> Any:
    if name in _CLIENT:
        from pyserve import client

        return getattr(client, name)
    if name in _SERVING:
        from pyserve import serving

        return getattr(serving, name)
    raise AttributeError(f"module 'pyserve' has no attribute {name!r}")
