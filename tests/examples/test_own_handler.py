"""examples/own_handler: right species, refusals of its own, also within a batch, and a count that is right."""

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

COUNTED = "IrisesNamed_total"  # as prometheus-client's parser calls a counter without an ending
SPECIES = ("setosa", "versicolor", "virginica")


def expected(iris: Example, flower: dict[str, float]) -> tuple[str, float]:
    network = iris.module("model").IrisNet()
    network.load_state_dict(torch.load(iris.folder / "iris.pth", weights_only=True))
    names = ("sepal_length", "sepal_width", "petal_length", "petal_width")
    with torch.inference_mode():
        probabilities = torch.softmax(network(torch.tensor([[flower[name] for name in names]])), 1)[0]
    return SPECIES[int(probabilities.argmax())], probabilities.max().item()


def test_flowers_are_named_refused_and_counted(tmp_path: Path) -> None:
    with example("own_handler", tmp_path) as iris:
        iris.follow(until="/metrics")
        named = re.findall(r"200 (\w+), ([\d.]+) sure", iris.printed_by("client.py"))
        flowers = iris.module("client").FLOWERS
        assert len(named) == 3
        for (species, probability), flower in zip(named, flowers, strict=False):
            wanted, wanted_probability = expected(iris, flower)
            assert species == wanted
            assert float(probability) == pytest.approx(wanted_probability, abs=6e-3)  # two digits are printed
        iris.server.wait_for(lambda: iris.server.metric(COUNTED) == 3, "the counts of all answers")
        for species, _ in named:
            assert iris.server.metric(COUNTED, Species=species) == 1
        iris.follow(until="pyserve stop")

        # Many at once, so that good ones share batches with bad ones.
        bodies = [json.dumps(flowers[number % len(flowers)]).encode() for number in range(60)]
        answers = at_once([partial(iris.server.ask, "POST", "/predictions/iris", body, JSON) for body in bodies])
        for body, answer in zip(bodies, answers, strict=True):
            flower = json.loads(body)
            if flower.get("petal_length"):
                wanted, wanted_probability = expected(iris, flower)
                assert answer.status == 200
                assert answer.json["species"] == wanted
                assert answer.json["probability"] == pytest.approx(wanted_probability, abs=1e-4)
            else:
                assert answer.status == 422
                assert answer.json["message"].startswith("petal_length is ")
        iris.server.wait_for(lambda: iris.server.metric(COUNTED) == 3 + 36, "each answer to be counted once")
        iris.follow()
        assert not iris.server.pid_path.exists()
