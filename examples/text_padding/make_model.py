"""Trains the network on a few made-up reviews: writes reviews.pth and vocabulary.json."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import torch
from model import WORDS, ReviewNet

DISHES = ("soup", "bread", "coffee", "cake", "service")
GOOD = ("good", "lovely", "fresh", "friendly", "fast")
BAD = ("bad", "cold", "salty", "rude", "slow")
FORMS = (
    "{dish} {word}",
    "the {dish} was {word}",
    "the {dish} was not {other}",
    "i came here for the {dish} and it was {word}",
    "we came late but the {dish} that we had was really very {word} and we told everybody that we know",
)


def reviews() -> list[tuple[list[str], int]]:
    """Words and verdict, 1 for a good one, of 250 reviews of 2 to 20 words."""
    made = []
    for form, dish, number in product(FORMS, DISHES, range(5)):
        for verdict, words, others in ((0, BAD, GOOD), (1, GOOD, BAD)):
            made.append((form.format(dish=dish, word=words[number], other=others[number]).split(), verdict))
    return made


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a network this small is trained fastest by one thread
    texts = reviews()
    # 0 is padding, 1 any word that is not known.
    vocabulary = {word: i for i, word in enumerate(sorted({word for words, _ in texts for word in words}), start=2)}
    assert max(vocabulary.values()) < WORDS

    longest = max(len(words) for words, _ in texts)
    ids = torch.tensor([[vocabulary[word] for word in words] + [0] * (longest - len(words)) for words, _ in texts])
    verdicts = torch.tensor([verdict for _, verdict in texts])
    network = ReviewNet()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(ids, (ids > 0).long()), verdicts).backward()
        optimizer.step()
    right = network(ids, (ids > 0).long()).argmax(1) == verdicts
    print(f"right about {right.float().mean():.1%} of the {len(texts)} reviews it was trained on")
    torch.save(network.state_dict(), "reviews.pth")
    Path("vocabulary.json").write_text(json.dumps(vocabulary))
    print(f"wrote reviews.pth and vocabulary.json, {len(vocabulary)} words")


if __name__ == "__main__":
    main()
