"""The comparison's own arithmetic, and that every server is sent the same input."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import compare, sockets, verdict
from bench.compare import DEFAULT_PEERS, PEER_SIDES, Run, build_parser, peers_of
from bench.encoders import TextEncoder
from bench.fitting import fit_head
from bench.sides import PACKAGES, Side, running, torchserve_archive_side, when_ready
from bench.workloads import UPLOAD_TYPE, Workload, binary_requests, handler
from bench.workloads import test_pictures as sample_pictures
from pyserve.handlers.image import ImageNetTransform, open_picture
from pyserve.request.codec import decode_request
from pyserve.request.messages import Request
from pyserve.zoo import ResNet, seed_weights

RESULTS: verdict.Results = {
    "nothing": {
        "pyserve, 1 worker": {"64": {"rate": [10.0, 30.0, 20.0]}, "1": {"rate": [1.0], "p50_ms": [0.5]}},
        "pyserve, 2 workers": {"64": {"rate": [25.0]}},
        "pyserve, varied heads, 1 worker": {"64": {"rate": [22.5]}},
        "pyserve, JSON, 1 worker": {"64": {"rate": [99.0]}},
        "mosec, 1 worker": {"64": {"rate": [10.0]}},
        "TorchServe, 2 workers": {"64": {"rate": [0.5]}},
        "bare echo": {"64": {"rate": [100.0]}, "1": {"p50_ms": [0.1]}},
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


def sides_of(load: Workload, workers: int) -> dict[str, Side]:
    return {name: make(Path("folder"), Path("bin"), load, workers, 2) for name, make in PEER_SIDES.items()}


def test_the_best_peer_is_looked_for_among_all_peers() -> None:
    load = Workload("nothing", "floats", Path("x"), [bytes(64)], (1,), 1)
    for name, side in sides_of(load, 2).items():
        results: verdict.Results = {"nothing": {side.label: {"64": {"rate": [7.0]}}}}
        assert side.label == f"{side.name}, 2 workers"
        assert verdict.best_peer(results, "nothing", "64") == 7, name
    assert PACKAGES.keys() == PEER_SIDES.keys()


def test_flags_choose_the_peers() -> None:
    def peers(*flags: str) -> list[str]:
        return peers_of(build_parser().parse_args(["nothing", *flags]))

    assert peers() == list(DEFAULT_PEERS) == ["torchserve", "litserve", "mosec"]
    assert peers("--all") == [*DEFAULT_PEERS, "pytriton", "ray", "bentoml", "mlserver"]
    assert peers("--peers", "ray", "mosec") == ["ray", "mosec"]
    assert peers("--all", "--peers", "ray", "mosec") == ["ray", "mosec", "pytriton", "bentoml", "mlserver"]
    assert peers("--peers") == []


def test_a_peer_that_cannot_be_installed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def environment(root: Path, name: str, _torch: str) -> Path:
        if name == "ray":
            raise RuntimeError("no such wheel")
        return root / name / "bin"

    monkeypatch.setattr(compare, "environment_of", environment)
    run = Run(tmp_path, build_parser().parse_args(["--peers", "ray", "mosec", "--environments", str(tmp_path)]))
    assert run.peers == {"mosec": tmp_path / "mosec" / "bin"}
    assert "ray could not be installed and is left out: no such wheel" in capsys.readouterr().err


def test_a_peer_that_ends_early_is_not_waited_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no port is good enough')"]
    with (
        pytest.raises(RuntimeError, match=r"peer ended with 1 before it answered; its log:\nno port is good enough"),
        running(command, {}, tmp_path / "peer.log") as check,
    ):
        when_ready("http://127.0.0.1:9/", b"", "text/plain", check)


def test_aims_of_the_handler_compare_the_same_archive() -> None:
    results: verdict.Results = {"handler": {
        "pyserve, batch size 1, 1 worker": {"1": {"rate": [1.0], "p50_ms": [0.1]}, "64": {"rate": [40.0]}},
        "TorchServe, batch size 1, 1 worker": {"1": {"rate": [1.0], "p50_ms": [0.45]}, "64": {"rate": [2.0]}},
        "pyserve, batch size 16, 1 worker": {"1": {"rate": [1.0], "p50_ms": [9.0]}, "64": {"rate": [1.0]}},
    }}  # fmt: skip
    reached = {what: work_out(results) for what, _, work_out in verdict.AIMS if what.startswith("handler")}
    assert reached == {
        "handler, 64 clients: of TorchServe, batch size 1": 20,
        "handler, 1 client: p50 of TorchServe / 3 / p50 of pyserve": pytest.approx(1.5),
    }


def test_both_servers_get_the_same_handler_archive(tmp_path: Path) -> None:
    load = handler(tmp_path)
    assert [path.name for path in load.archives.values()] == ["handler1.mar", "handler16.mar"]
    for archive, path in load.archives.items():
        assert path.exists()
        side = torchserve_archive_side(tmp_path, Path("bin"), load, archive)
        assert side.label == f"TorchServe, {archive}, 1 worker"
        assert side.bodies == [b"x" * 64]


def test_aims_say_what_was_reached_and_leave_out_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    machine = {"cpu": "x", "cores": 2, "versions": {}}
    verdict.print_tables(
        {"machine": machine, "load_average_before": (0, 0, 0), "rounds": 3, "duration_s": 1, "peers": {}}, RESULTS
    )
    lines = [line for line in capsys.readouterr().out.split("### Aims")[1].splitlines() if line.startswith("| nothing")]
    assert lines == [
        "| nothing, raw, 64 clients: of mosec | 1.5 | 2.50 | reached |",
        "| nothing, raw, 64 clients: of TorchServe, batching on | 40 | 50.00 | reached |",
        "| nothing, raw, 64 clients: of the bare echo | 0.5 | 0.25 | missed |",
        "| nothing, raw, varied heads, 64 clients: of the same with one head | 0.85 | 0.90 | reached |",
        "| nothing, JSON, 64 clients: of the bare echo | 0.25 | 0.99 | reached |",
        "| nothing, raw, 1 client: 2 x p50 of the bare echo / p50 | 1 | 0.40 | missed |",
    ]


def test_every_form_of_a_body_holds_the_same_input() -> None:
    numbers = torch.linspace(-1, 1, 16)
    load = Workload("nothing", "floats", Path("x"), [numbers.numpy().tobytes()], (1,), 1)
    assert json.loads(load.json_bodies()[0])["input"] == numbers.tolist()
    picture = Workload("p", "picture", Path("x"), [b"\xff\xd8\r\n--\r\n"], (1,), 1)
    request = Request("POST", "/", headers=[("Content-Type", UPLOAD_TYPE)], body=bytearray(picture.upload_bodies()[0]))
    assert decode_request(request) == {"request": bytearray(picture.bodies[0])}


def test_every_peer_is_sent_the_same_input() -> None:
    numbers = torch.linspace(-1, 1, 16)
    raw = numbers.numpy().tobytes()
    floats = sides_of(Workload("nothing", "floats", Path("x"), [raw], (1,), 1), 1)
    assert floats["ray"].bodies == [raw]
    assert floats["pytriton"].bodies[0].endswith(raw)
    assert json.loads(floats["bentoml"].bodies[0]) == {"inputs": [numbers.tolist()]}
    assert json.loads(floats["mlserver"].bodies[0])["inputs"][0]["data"] == numbers.tolist()
    ids = torch.tensor([3, 4, 5])
    tokens = sides_of(Workload("encoder", "tokens", Path("x"), [ids.numpy().tobytes()], (1,), 1), 1)
    assert json.loads(tokens["bentoml"].bodies[0]) == {"inputs": [[3, 4, 5]]}
    (sent,) = json.loads(tokens["mlserver"].bodies[0])["inputs"]
    assert base64.b64decode(sent["data"][0]) == ids.numpy().tobytes()


def test_binary_requests_of_any_size_have_one_header() -> None:
    load = Workload("encoder", "tokens", Path("x"), [bytes(8), bytes(2048)], (1,), 1)
    bodies, head_size = binary_requests(load, "BYTES")
    for body, raw in zip(bodies, load.bodies, strict=True):
        (tensor,) = json.loads(body[:head_size])["inputs"]
        assert tensor["shape"] == [1, 1]
        assert tensor["parameters"]["binary_data_size"] == len(body) - head_size == 4 + len(raw)
        assert body[head_size:] == len(raw).to_bytes(4, "little") + raw
    load = Workload("nothing", "floats", Path("x"), [bytes(64)], (1,), 1)
    (body,), head_size = binary_requests(load, "FP32")
    assert json.loads(body[:head_size])["inputs"][0]["shape"] == [1, 16]


@pytest.mark.slow
def test_a_fitted_last_layer_tells_the_pictures_apart(tmp_path: Path) -> None:
    network = ResNet(18)
    seed_weights(network)
    pictures = sample_pictures(tmp_path)
    fit_head(network.eval(), pictures)
    transform = ImageNetTransform()
    with torch.inference_mode():
        scores = network(torch.stack([transform(open_picture(each)) for each in pictures]))
    best, second = scores.topk(2).values.unbind(1)
    assert len(set(scores.argmax(1).tolist())) == len(pictures)
    assert float((best - second).min()) > 1


def test_bare_sockets_carry_the_bytes_there_and_back() -> None:
    command = [sys.executable, sockets.__file__, "--size", "300000", "--clients", "2", "--duration", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) > 0


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
