"""The network: the words so far in, a score for each word that may follow out."""

from __future__ import annotations

from torch import Tensor, nn


class WordNet(nn.Module):
    """words int64 [n, steps], and what it remembers, float32 [1, n, 64] or None -> scores [n, steps, words], memory."""

    def __init__(self, words: int = 55) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 32)
        self.memory = nn.GRU(32, 64, batch_first=True)
        self.scores = nn.Linear(64, words)

    def forward(self, words: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        remembered, memory = self.memory(self.embedding(words), memory)
        return self.scores(remembered), memory
