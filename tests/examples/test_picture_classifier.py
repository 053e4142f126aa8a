"""examples/picture_classifier: pictures that a client sends are named as the network alone names them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.examples.readme_run import example

pytestmark = pytest.mark.server

MEAN, STD = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def prepared(path: Path) -> torch.Tensor:
    """What an ImageNet classifier is given of a picture of 256 x 256 pixels: its middle, normalised."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float()[16:240, 16:240] / 255
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1).unsqueeze(0)


def test_pictures_are_named_as_the_network_names_them(tmp_path: Path) -> None:
    with example("picture_classifier", tmp_path) as classifier:
        classifier.follow(until="pyserve stop")
        lines = re.findall(r"pictures/(\d)\.png: (\w+) ([\d.]+)", classifier.printed_by("client.py"))
        network = classifier.module("model").DigitNet().eval()
        network.load_state_dict(torch.load(classifier.folder / "digits.pth", weights_only=True))
        assert [int(file) for file, _, _ in lines] == list(range(10))
        for file, name, probability in lines:
            path = classifier.folder / f"pictures/{file}.png"
            with torch.inference_mode():
                expected = torch.softmax(network(prepared(path)), 1)[0]
            assert name == NAMES[int(file)] == NAMES[int(expected.argmax())]
            assert float(probability) == pytest.approx(expected.max().item(), abs=6e-4)  # three digits are printed
            answer = classifier.server.ask("POST", "/predictions/digits", path.read_bytes())
            assert len(answer.json) == 5
            for label, value in answer.json.items():
                assert value == pytest.approx(expected[NAMES.index(label)].item(), abs=1e-5)
        labels = json.loads((classifier.folder / "index_to_name.json").read_text())
        assert tuple(labels.values()) == NAMES
        classifier.follow()
        assert not classifier.server.pid_path.exists()
