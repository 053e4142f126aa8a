"""The network: the words of a text and which of them are padding in, a score for bad and one for good out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WORDS, SIZE = 64, 32  # the vocabulary, with room for more words; numbers per word


class ReviewNet(nn.Module):
    """ids int64 [n, length] and mask int64 [n, length], 1 for a word and 0 for padding -> scores float32 [n, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, SIZE)
        self.query, self.key, self.value = (nn.Linear(SIZE, SIZE) for _ in range(3))
        self.scores = nn.Linear(SIZE, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        words = self.words(ids)
        # Nothing may look at padding: its share of the attention is 0, ...
        closeness = self.query(words) @ self.key(words).transpose(1, 2) / math.sqrt(SIZE)
        closeness = closeness.masked_fill(mask.unsqueeze(1) == 0, -1e9)
        seen = words + torch.softmax(closeness, 2) @ self.value(words)
        # ... and the mean over a text is over its words.
        is_word = mask.unsqueeze(2).to(seen.dtype)
        return self.scores((seen * is_word).sum(1) / is_word.sum(1))
