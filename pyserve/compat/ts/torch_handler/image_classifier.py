"""`ImageClassifier` under TorchServe's name."""

from pyserve.handlers.image_classifier import ImageClassifier
from pyserve.handlers.vision_handler import VisionHandler
from ts.handler_utils.timer import timed
from ts.utils.util import map_class_to_label

__all__ = ["ImageClassifier", "VisionHandler", "map_class_to_label", "timed"]
