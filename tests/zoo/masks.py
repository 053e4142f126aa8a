"""Inputs that belong together: masks, types, lengths, and what fills them up."""

from __future__ import annotations

import torch

from .case import Case, Item, Items, tensor

POOLED = """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(50, 8)
            self.g = nn.Linear(8, 8)

        def forward(self, ids, mask):
            m = mask.unsqueeze(-1).float()
            return (torch.tanh(self.g(self.e(ids))) * m).sum(1) / m.sum(1).clamp(min=1)
"""


def _pairs(*sizes: tuple[int, int]) -> Items:
    """Ids and a mask of these lengths; what is of different lengths is no input of the model."""

    def make(generator: torch.Generator) -> list[Item]:
        return [
            (torch.randint(1, 50, (1, ids), generator=generator), torch.ones(1, mask, dtype=torch.int64))
            for ids, mask in sizes
        ]

    return make


def _picture_masks(generator: torch.Generator) -> list[Item]:
    """Pictures with masks of their size, and of others."""
    sizes = (((8, 8), (8, 8)), ((5, 12), (5, 12)), ((8, 6), (6, 8)), ((2, 3), (2, 3)), ((8, 8), (8, 9)))
    return [
        (torch.randn(1, 3, *picture, generator=generator), (torch.rand(1, *mask, generator=generator) > 0.5).float())
        for picture, mask in sizes
    ]


SIZES = ((3, 3), (8, 8), (1, 1), (13, 13), (8, 5), (5, 8), (3, 12))

CASES = [
    Case(
        "short_mask", "a mask shorter than its ids, each filled up by itself", POOLED,
        (tensor(-1, dtype="int64", name="ids", pad_to=[8, 16], same="length"),
         tensor(-1, dtype="int64", name="mask", pad_to=[8, 16], same="length")),
        _pairs(*SIZES), ("eager", "scripted"),
    ),
    Case(
        "short_mask_undeclared", "the same, and nobody says that they belong together", POOLED,
        (tensor(-1, dtype="int64", name="ids", pad_to=[8, 16]),
         tensor(-1, dtype="int64", name="mask", pad_to=[8, 16])),
        _pairs(*SIZES), ("eager", "scripted"),
    ),
    Case(
        "short_mask_unpadded", "the same without filling up: sizes of 1 broadcast", POOLED,
        (tensor(-1, dtype="int64", name="ids", same="length"), tensor(-1, dtype="int64", name="mask", same="length")),
        _pairs(*SIZES), ("eager", "scripted"),
    ),
    Case(
        "picture_mask", "a mask of another size than its picture", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3, padding=1)

            def forward(self, x, mask):
                kept = mask.unsqueeze(1)
                return (self.conv(x) * kept).sum((2, 3)) / kept.sum((2, 3)).clamp(min=1)
        """, (tensor(3, "2..32", "2..32", name="x", same=["height", "width"]),
              tensor("2..32", "2..32", name="mask", same=["height", "width"])),
        _picture_masks, ("eager", "scripted"),
    ),
    Case(
        "filled_ids", "filled up with zeros, and a model that leaves zeros out", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.e = nn.Embedding(50, 8)

            def forward(self, ids):
                m = (ids != 0).unsqueeze(-1).float()
                return (self.e(ids) * m).sum(1)
        """, (tensor(-1, dtype="int64", pad_to=[4, 8, 32]),),
        lambda generator: [(torch.randint(1, 50, (1, n), generator=generator),) for n in (1, 3, 4, 5, 9, 32)],
        ("eager", "scripted"),
    ),
]  # fmt: skip
