"""examples/two_inputs: the same scores whichever way a request comes, alone and in batches: those of the network."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.examples.readme_run import Example, example
from tests.support.serving import JSON, at_once

pytestmark = pytest.mark.server

Customer = dict[str, list[float]]


def expected(genres: Example, many: list[Customer]) -> torch.Tensor:
    """The network's scores [n, 6], each customer alone."""
    network = genres.module("model").GenreNet()
    network.load_state_dict(torch.load(genres.folder / "genres.pth", weights_only=True))
    with torch.inference_mode():
        rows = [network(torch.tensor([each["profile"]]), torch.tensor([each["history"]])) for each in many]
    return torch.cat(rows)


def test_scores_are_the_networks_in_each_way_of_asking(tmp_path: Path) -> None:
    with example("two_inputs", tmp_path) as genres:
        genres.follow(until="pyserve stop")
        client, url = genres.module("client"), genres.server.url()
        many = client.customers()
        wanted = expected(genres, many)

        printed = re.findall(r"^customer \d+:(.*)$", genres.printed_by("client.py"), re.MULTILINE)
        assert len(printed) == len(many) == 12
        shown = torch.tensor([[float(score) for score in line.split()] for line in printed])
        torch.testing.assert_close(shown, wanted, rtol=0, atol=6e-5)  # four digits are printed
        assert "the three ways: 0.000000" in genres.printed_by("client.py")

        for ask in (client.as_json, client.as_form):
            torch.testing.assert_close(torch.tensor([ask(url, each) for each in many]), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor(client.as_tensors(url, many)), wanted, rtol=1e-5, atol=1e-6)
        answered = json.loads(genres.printed_by('-d \'{"profile"'))
        [also] = expected(genres, [{"profile": [0.69, 0.52, -0.16, -0.48], "history": [864, 394, 776, 911, 430]}])
        torch.testing.assert_close(torch.tensor(answered), also, rtol=1e-5, atol=1e-6)

        # Many clients at once; whoever shares a batch has the same answer.
        bodies = [json.dumps(many[number % len(many)]).encode() for number in range(96)]
        answers = at_once([partial(genres.server.ask, "POST", "/predictions/genres", body, JSON) for body in bodies])
        for number, answer in enumerate(answers):
            assert answer.status == 200
            torch.testing.assert_close(torch.tensor(answer.json), wanted[number % len(many)], rtol=1e-5, atol=1e-6)
        sizes = genres.server.describe("genres")["batchSizeHistogram"]
        assert max(map(int, sizes)) == 8  # of the rows of one request
        genres.follow()
        assert not genres.server.pid_path.exists()
