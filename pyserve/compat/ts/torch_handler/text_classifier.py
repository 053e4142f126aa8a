"""`TextClassifier` under TorchServe's name."""

from pyserve.handlers.text_classifier import TextClassifier

__all__ = ["TextClassifier"]
