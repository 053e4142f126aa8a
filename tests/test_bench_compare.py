"""The comparison's own arithmetic, and that every server is sent the same input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import verdict
from bench.workloads import UPLOAD_TYPE, TextEncoder, Workload
from pyserve.codec import decode_request
from pyserve.messages import Request

RESULTS: verdict.Results = {
    "nothing": {
        "pyserve, 1 worker": {"64": {"rate": [10.0, 30.0, 20.0]}, "1": {"rate": [1.0], "p50_ms": [0.5]}},
        "pyserve, 2 workers": {"64": {"rate": [25.0]}},
        "pyserve, JSON, 1 worker": {"64": {"rate": [99.0]}},
        "mosec, 1 worker": {"64": {"rate": [10.0]}},
        "TorchServe, 2 workers": {"64": {"rate": [0.5]}},
        "bare echo": {"64": {"rate": [100.0]}},
    },
    "nothing, open loop": {"80% of the peak": {"open": {"rate": [7.0]}}},
}


def test_a_side_is_as_good_as_its_best_number_of_workers() -> None:
    assert verdict.best(RESULTS, "nothing", "pyserve", "64") == 25
    assert verdict.best(RESULTS, "nothing", "pyserve, JSON", "64") == 99
    assert verdict.best_peer(RESULTS, "nothing", "64") == 10
    with pytest.raises(KeyError):
        verdict.best(RESULTS, "nothing", "LitServe", "64")
    with pytest.raises(KeyError):
        verdict.best(RESULTS, "nothing", "mosec", "8")


def test_aims_say_what_was_reached_and_leave_out_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    machine = {"cpu": "x", "cores": 2, "versions": {}}
    verdict.print_tables(
        {"machine": machine, "load_average_before": (0, 0, 0), "rounds": 3, "duration_s": 1, "peers": {}}, RESULTS
    )
    lines = [line for line in capsys.readouterr().out.split("### Aims")[1].splitlines() if line.startswith("| nothing")]
    assert lines == [
        "| nothing, raw, 64 clients: of mosec | 1.5 | 2.50 | reached |",
        "| nothing, raw, 64 clients: of TorchServe, batching on | 40 | 50.00 | reached |",
        "| nothing, raw, 64 clients: of the bare echo | 0.4 | 0.25 | missed |",
        "| nothing, raw, 1 client: 0.25 ms / p50 | 1 | 0.50 | missed |",
    ]


def test_every_form_of_a_body_holds_the_same_input() -> None:
    numbers = torch.linspace(-1, 1, 16)
    load = Workload("nothing", "floats", Path("x"), [numbers.numpy().tobytes()], (1,), 1)
    assert json.loads(load.json_bodies()[0])["input"] == numbers.tolist()
    picture = Workload("p", "picture", Path("x"), [b"\xff\xd8\r\n--\r\n"], (1,), 1)
    request = Request("POST", "/", headers=[("Content-Type", UPLOAD_TYPE)], body=bytearray(picture.upload_bodies()[0]))
    assert decode_request(request) == {"request": bytearray(picture.bodies[0])}


def test_the_encoder_leaves_padding_out() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(width=32, layers=2).eval()
    ids = torch.randint(1, 1000, (2, 12))
    padded = torch.cat((ids, torch.zeros(2, 20, dtype=torch.int64)), 1)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(padded), encoder(ids), atol=1e-5, rtol=1e-5)


def test_a_mix_is_the_sum_of_shares() -> None:
    mix: dict[str, dict[str, dict[str, list[float]]]] = {
        "a, alone": {"8": {"rate": [100.0]}}, "b, alone": {"4": {"rate": [10.0, 30.0, 20.0]}},
        "a, at once": {"8": {"rate": [50.0]}}, "b, at once": {"4": {"rate": [5.0]}},
    }  # fmt: skip
    assert verdict.share_of_alone(mix) == 0.75
