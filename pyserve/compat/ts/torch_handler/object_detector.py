"""`ObjectDetector` under TorchServe's name."""

from pyserve.handlers.object_detector import ObjectDetector
from pyserve.handlers.vision_handler import VisionHandler
from ts.utils.util import map_class_to_label

__all__ = ["ObjectDetector", "VisionHandler", "map_class_to_label"]
