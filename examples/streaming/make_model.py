"""Teaches the network text.txt by heart: writes words.pth and vocabulary.json."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from model import WordNet


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a network this small is trained fastest by one thread
    text = Path("text.txt").read_text().split()
    vocabulary = sorted(set(text))
    numbers = torch.tensor([[vocabulary.index(word) for word in text]])
    network = WordNet(len(vocabulary))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for _ in range(120):
        optimizer.zero_grad()
        scores, _ = network(numbers[:, :-1])
        torch.nn.functional.cross_entropy(scores[0], numbers[0, 1:]).backward()
        optimizer.step()
    right = network(numbers[:, :-1])[0].argmax(2) == numbers[:, 1:]
    print(f"knows {right.float().mean():.1%} of the text by heart")
    torch.save(network.state_dict(), "words.pth")
    Path("vocabulary.json").write_text(json.dumps(vocabulary))
    print(f"wrote words.pth and vocabulary.json, {len(vocabulary)} words")


if __name__ == "__main__":
    main()
