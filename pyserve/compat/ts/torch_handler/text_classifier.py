"""`TextClassifier` under TorchServe's name."""

import logging

from pyserve.handlers.text_classifier import TextClassifier
from pyserve.handlers.text_handler import TextHandler
from ts.handler_utils.text_utils import ngrams_iterator
from ts.utils.util import map_class_to_label

logger = logging.getLogger(__name__)

__all__ = ["TextClassifier", "TextHandler", "logger", "map_class_to_label", "ngrams_iterator"]
