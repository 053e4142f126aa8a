"""examples/streaming: the words are the network's, each is a part, and the handler ends when its client goes."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.examples.readme_run import Example, example
from tests.support.serving import at_once

pytestmark = pytest.mark.server

SENT = "WordsSent_total"  # as prometheus-client's parser calls a counter without an ending


def expected(story: Example, prompt: str, count: int) -> list[str]:
    """The ``count`` words that the network finds most likely after ``prompt``; it reads all words again for each."""
    vocabulary = json.loads((story.folder / "vocabulary.json").read_text())
    network = story.module("model").WordNet()
    network.load_state_dict(torch.load(story.folder / "words.pth", weights_only=True))
    words = prompt.split()
    for _ in range(count):
        with torch.inference_mode():
            scores, _ = network(torch.tensor([[vocabulary.index(word) for word in words]]))
        words.append(vocabulary[int(scores[0, -1].argmax())])
    return words[len(prompt.split()) :]


def test_words_are_sent_one_by_one_until_the_client_goes(tmp_path: Path) -> None:
    with example("streaming", tmp_path) as story:
        story.follow(until="pyserve stop")
        assert story.printed_by("client.py a server").split() == expected(story, "a server", 20)
        parts = re.findall(r"^ *\d+ ms: (.*)$", story.printed_by("--times"), re.MULTILINE)
        assert parts == expected(story, "the worker takes", 8)
        assert story.printed_by("curl").split() == expected(story, "every answer goes", 15)
        assert story.printed_by("a cat").startswith("400 ")
        # Of an answer's words all but the last are parts that are counted.
        counted = 19 + 7 + 14
        story.server.wait_for(lambda: story.server.metric(SENT) == counted, "the count of words")

        client, url = story.module("client"), story.server.url()

        def whole_story(prompt: str, count: int) -> list[str]:
            return list(client.story(url, prompt, count))

        prompts = ("a server", "the model answers", "if it is", "then the")
        told = at_once([partial(whole_story, prompt, 12) for prompt in prompts])
        for prompt, words in zip(prompts, told, strict=True):
            assert [word.strip() for word in words] == expected(story, prompt, 12)
        counted += 4 * 11

        # A handler that kept its parts, or did not see that its client has gone, would send and count all 1000.
        for prompt in ("a server", "then the"):
            endless = client.story(url, prompt, 1000)
            begin = [next(endless).strip() for _ in range(3)]
            assert begin == expected(story, prompt, 3)
            endless.close()
        told = at_once([partial(whole_story, prompt, 2) for prompt in prompts])
        assert [len(words) for words in told] == [2, 2, 2, 2]  # both workers are free again
        story.server.wait_for(lambda: story.server.metric(SENT) >= counted + 4 + 2 * 3, "the count of words")
        assert story.server.metric(SENT) < counted + 4 + 2 * 999
        story.follow()
        assert not story.server.pid_path.exists()
