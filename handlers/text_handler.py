"""What handlers for text have in common: the vocabulary, and from a request's text to words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pyserve.context import Context
from pyserve.handlers import text
from pyserve.handlers.base_handler import BaseHandler


class TextHandler(BaseHandler):
    """Text in; subclasses override `preprocess`, `inference` and `postprocess`.

    Attributes:
        source_vocab: word -> number, from source_vocab.pt in the archive; None before `initialize`.
    """

    sample_kind = "text"
    source_vocab: Any = None

    def initialize(self, context: Context) -> None:
        """Load the model and the vocabulary.

        Raises:
            ModelLoadError: one of them cannot be used.
        """
        super().initialize(context)
        self.initialized = False
        self.source_vocab = text.read_vocabulary(Path(self.get_source_vocab_path(context)))
        self.initialized = True

    def get_source_vocab_path(self, ctx: Context) -> str:
        """Where the vocabulary is."""
        return str(Path(ctx.system_properties["model_dir"]) / "source_vocab.pt")

    def _remove_html_tags(self, line: str) -> str:
        return text.remove_html(line)

    def _expand_contractions(self, line: str) -> str:
        return text.expand_contractions(line)

    def _remove_accented_characters(self, line: str) -> str:
        return text.remove_accents(line)

    def _remove_punctuation(self, line: str) -> str:
        return text.remove_punctuation(line)

    def _tokenize(self, line: str) -> list[str]:
        return text.basic_english(line)

    def get_word_token(self, input_tokens: list[int]) -> list[str]:
        """The words of these numbers."""
        words = {number: word for word, number in self.source_vocab.get_stoi().items()}
        return [words[number] for number in input_tokens]

    def summarize_attributions(self, attributions: torch.Tensor) -> torch.Tensor:
        """Attributions [1, words, dimensions] -> one number per word, scaled to a vector of length 1."""
        totals = attributions.sum(dim=-1).squeeze(0)
        length = torch.linalg.vector_norm(totals)
        return totals / length if length > 0 else totals
