"""examples/text_padding: a review's answer is the network's for that review, not padded, whatever shares its batch."""

from __future__ import annotations

import json
import random
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.examples.readme_run import Example, example
from tests.support.serving import at_once

pytestmark = pytest.mark.server


class Alone:
    """What the network says of a review by itself, without padding."""

    def __init__(self, reviews: Example):
        self.vocabulary = json.loads((reviews.folder / "vocabulary.json").read_text())
        self._network = reviews.module("model").ReviewNet()
        self._network.load_state_dict(torch.load(reviews.folder / "reviews.pth", weights_only=True))

    def good(self, review: str, padding: int = 0) -> float:
        """From 0 to 1. With ``padding``, that many words of padding that are taken for words."""
        ids = torch.tensor([[self.vocabulary.get(word, 1) for word in review.split()] + [0] * padding])
        with torch.inference_mode():
            return float(torch.softmax(self._network(ids, torch.ones_like(ids)), 1)[0, 1])


def test_a_review_has_the_same_answer_alone_and_in_a_batch(tmp_path: Path) -> None:
    with example("text_padding", tmp_path) as reviews:
        reviews.follow(until="pyserve stop")
        alone, client, url = Alone(reviews), reviews.module("client"), reviews.server.url()
        lines = re.findall(
            r"([\d.]+) in a batch of (\d+), ([\d.]+) in a batch of (\d+): (.*)", reviews.printed_by("client.py")
        )
        assert [review for *_, review in lines] == client.REVIEWS
        for first, _, second, _, review in lines:
            assert first == second
            assert float(first) == pytest.approx(alone.good(review), abs=6e-4)  # three digits are printed
        assert max(int(size) for *_, size, _ in lines) > 1
        assert json.loads(reviews.printed_by("The coffee"))["good"] == pytest.approx(
            alone.good("the coffee was not cold")
        )

        # Words at random, of all lengths that are allowed and more at once than a batch holds.
        dice = random.Random(0)
        words = [*alone.vocabulary, "unheard"]
        made = [" ".join(dice.choices(words, k=1 + number % 32)) for number in range(64)]
        answers = at_once([partial(client.ask, url, review) for review in made])
        assert max(size for _, size in answers) > 1
        for review, (good, _) in zip(made, answers, strict=True):
            assert good == pytest.approx(alone.good(review), abs=1e-5)
        # Padding that counted would have been seen.
        assert max(abs(alone.good(review, padding=4) - alone.good(review)) for review in made) > 0.1
        reviews.follow()
        assert not reviews.server.pid_path.exists()
