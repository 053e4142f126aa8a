"""Writes genres.pth: the network with seeded random weights, since it is the inputs that this example is about."""

from __future__ import annotations

import torch
from model import GenreNet


def main() -> None:
    torch.manual_seed(0)
    torch.save(GenreNet().state_dict(), "genres.pth")
    print("wrote genres.pth")


if __name__ == "__main__":
    main()
