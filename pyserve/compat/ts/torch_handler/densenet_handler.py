"""`DenseNetHandler` under TorchServe's name."""

from pyserve.handlers.densenet_handler import DenseNetHandler

__all__ = ["DenseNetHandler"]
