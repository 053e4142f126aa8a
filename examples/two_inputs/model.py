"""The network: who somebody is and what they watched last in, one score per genre out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FILMS, GENRES = 1000, 6


class GenreNet(nn.Module):
    """profile float32 [n, 4] and history int64 [n, 5], numbers of films -> scores float32 [n, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.films = nn.Embedding(FILMS, 16)
        self.person = nn.Linear(4, 16)
        self.genres = nn.Linear(32, GENRES)

    def forward(self, profile: Tensor, history: Tensor) -> Tensor:
        watched = self.films(history).mean(1)
        return self.genres(torch.cat((torch.tanh(self.person(profile)), watched), 1))
