"""Text encoders for the comparison, in plain torch with seeded weights: token ids in, one vector for a text out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 1000
# Of `BertEncoder`: BERT's own vocabulary; more positions than any text here has.
BERT_VOCABULARY = 30522
BERT_POSITIONS = 512


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with its residual and its norm (Vaswani et al., 2017)."""

    def __init__(self, width: int, heads: int, activation: nn.Module | None = None):
        super().__init__()
        self.heads = heads
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.activation = activation or nn.ReLU()

    def forward(self, features: Tensor, is_token: Tensor) -> Tensor:
        count, length, width = features.shape
        parts = self.inputs(features).view(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_token)
        features = self.norm1(features + self.outputs(mixed.transpose(1, 2).reshape(count, length, width)))
        return self.norm2(features + self.narrow(self.activation(self.wide(features))))


def mean_of_tokens(features: Tensor, is_token: Tensor) -> Tensor:
    """float [n, length, width] and bool [n, length] -> float [n, width]: padding is left out."""
    kept = is_token.unsqueeze(2).to(features.dtype)
    return (features * kept).sum(1) / kept.sum(1)


class TextEncoder(nn.Module):
    """A small transformer encoder: token ids int64 [n, length], 0 for no token -> float [n, 64]."""

    def __init__(self, width: int = 256, layers: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(EncoderLayer(width, 4) for _ in range(layers))
        self.head = nn.Linear(width, 64)

    def forward(self, ids: Tensor) -> Tensor:
        is_token = ids != 0
        mask = is_token.unsqueeze(1).unsqueeze(1)
        features = self.embedding(ids)
        for layer in self.layers:
            features = layer(features, mask)
        return self.head(mean_of_tokens(features, is_token))


class BertEncoder(nn.Module):
    """BERT's encoder (Devlin et al., 2018), 384 wide and 12 layers deep, as sentence encoders are that run on CPUs.

    Token ids int64 [n, length], 0 for no token, at most ``BERT_POSITIONS`` of them -> float [n, width], the mean over
    the tokens. 33 million weights at its own size.
    """

    def __init__(self, width: int = 384, layers: int = 12, heads: int = 12, vocabulary: int = BERT_VOCABULARY):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(BERT_POSITIONS, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, nn.GELU()) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        is_token = ids != 0
        mask = is_token.unsqueeze(1).unsqueeze(1)
        places = torch.arange(ids.shape[1], device=ids.device)
        features = self.norm(self.words(ids) + self.positions(places))
        for layer in self.layers:
            features = layer(features, mask)
        return mean_of_tokens(features, is_token)
