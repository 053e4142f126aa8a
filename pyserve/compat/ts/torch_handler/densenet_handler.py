"""`DenseNetHandler` under TorchServe's name."""

import logging

from pyserve.handlers.densenet_handler import DenseNetHandler
from ts.utils.util import list_classes_from_module

logger = logging.getLogger(__name__)

__all__ = ["DenseNetHandler", "list_classes_from_module", "logger"]
