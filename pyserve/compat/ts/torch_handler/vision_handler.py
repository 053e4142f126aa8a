"""`VisionHandler` under TorchServe's name."""

from pyserve.handlers.base_handler import BaseHandler
from pyserve.handlers.vision_handler import VisionHandler
from ts.handler_utils.timer import timed

__all__ = ["BaseHandler", "VisionHandler", "timed"]
