"""Tokens of texts."""

from pyserve.handlers.text import get_tokenizer, ngrams_iterator

__all__ = ["get_tokenizer", "ngrams_iterator"]
