"""`ImageSegmenter` under TorchServe's name."""

from pyserve.handlers.image_segmenter import ImageSegmenter
from pyserve.handlers.vision_handler import VisionHandler

__all__ = ["ImageSegmenter", "VisionHandler"]
