"""A real server over real sockets: right answers from every kind of archive, alone, in batches, while it changes."""

from __future__ import annotations

import io
import itertools
import json
import shlex
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from pyserve.commands.example import digits_split, train_digits
from pyserve.handlers.image import ImageNetTransform
from pyserve.models.sample import write_sample_picture
from tests.support.serving import JSON, LIMIT_S, RAW, SEED, Client, Load, Server, at_once
from tests.support.serving_models import (  # fmt: skip
    LABELS,
    Burn,
    Linear,
    Pictures,
    Wide,
    write_eager,
    write_linear,
    write_package,
    write_torchscript,
)

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = pytest.mark.server
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

CLIENTS = 8


@pytest.fixture(scope="module")
def digits(site: Server) -> torch.nn.Module:
    """Serves ``digits``, an eager archive that is traced on load; the network it was made from."""
    network, _ = train_digits()
    source = "from pyserve.zoo import DigitsNet\n\n\nclass Digits(DigitsNet):\n    pass\n"
    config = {"input": {"dtype": "float32", "shape": [1, 8, 8]}}
    write_eager(site.store, "digits", source, network.state_dict(), config=config)
    site.manage("POST", "/models?url=digits.mar&initial_workers=1")
    return network


@pytest.fixture(scope="module")
def package(site: Server) -> torch.nn.Module:
    """Serves ``package``, compiled by AOTInductor for any batch size."""
    network = Linear(5)
    write_package(site.store, network, torch.randn(2, 4), "package")
    site.manage("POST", "/models?url=package.mar&initial_workers=1")
    return network


@pytest.fixture(scope="module", params=["torchscript", "eager", "pt2"])
def served(request: pytest.FixtureRequest, site: Server) -> tuple[str, torch.nn.Module, tuple[int, ...]]:
    """Name, network and item shape of a served model."""
    if request.param == "torchscript":
        return "linear", Linear(), (4,)
    if request.param == "eager":
        return "digits", request.getfixturevalue("digits"), (1, 8, 8)
    return "package", request.getfixturevalue("package"), (4,)


def items_of(shape: tuple[int, ...], count: int, seed: int = SEED) -> torch.Tensor:
    print(f"PYSERVE_TEST_SEED={SEED}")
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def answers_of(network: torch.nn.Module, items: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        answers: torch.Tensor = network(items)
    return answers


def assert_close(got: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(got), expected, rtol=1e-5, atol=1e-5)


def photo(seed: int, width: int = 320, height: int = 240) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def labelled(picture: bytes) -> dict[str, float]:
    """What image_classifier is to answer, from torch called directly."""
    pixels = ImageNetTransform()(Image.open(io.BytesIO(picture)).convert("RGB"))
    probabilities, classes = torch.softmax(answers_of(Pictures().eval(), pixels[None])[0], 0).topk(5)
    return {LABELS[str(index)]: value for index, value in zip(classes.tolist(), probabilities.tolist(), strict=True)}


def batch_counts(site: Server, model: str) -> dict[str, int]:
    counts: dict[str, int] = site.describe(model)["batchSizeHistogram"]
    return counts


def wait_for_batches(site: Server, model: str, size: int) -> None:
    """Larger batches are tried before they are used."""
    deadline = time.monotonic() + LIMIT_S
    while site.describe(model)["checks"]["batchSize"] < size:
        assert time.monotonic() < deadline, site.describe(model)["checks"]
        time.sleep(0.05)


# --- right answers ----------------------------------------------------------------------------------------------------


def test_answers_equal_those_of_torch(site: Server, served: tuple[str, torch.nn.Module, tuple[int, ...]]) -> None:
    name, network, shape = served
    items = items_of(shape, 10)
    with site.client() as client:
        for item, expected in zip(items, answers_of(network, items), strict=True):
            answer = client.predict(name, item.tolist())
            assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
            assert_close(answer.json, expected)
            raw = client.ask("POST", f"/predictions/{name}", item.numpy().tobytes(), RAW)
            assert raw.headers["x-tensor-dtype"] == "float32"
            assert raw.headers["x-tensor-shape"] == ",".join(map(str, expected.shape))
            assert_close(torch.frombuffer(bytearray(raw.body), dtype=torch.float32), expected)


def test_a_form_field_is_answered_with_json(site: Server) -> None:
    item = [1.0, 2.0, 3.0, 4.0]
    body = (
        b'--end\r\nContent-Disposition: form-data; name="data"; filename="x.json"\r\n'
        b"Content-Type: application/json\r\n\r\n" + json.dumps(item).encode() + b"\r\n--end--\r\n"
    )
    answer = site.ask("POST", "/predictions/linear", body, {"Content-Type": "multipart/form-data; boundary=end"})
    assert answer.status == 200, answer.body
    assert_close(answer.json, answers_of(Linear(), torch.tensor([item]))[0])


def test_each_request_of_a_mixed_batch_gets_its_own_answer(
    site: Server, served: tuple[str, torch.nn.Module, tuple[int, ...]]
) -> None:
    name, network, shape = served
    items = items_of(shape, CLIENTS * 12, SEED + 1)
    expected = answers_of(network, items)

    def ask(own: slice) -> None:
        with site.client() as client:
            for item, row in zip(items[own], expected[own], strict=True):
                assert_close(client.predict(name, item.tolist()).json, row)

    before = batch_counts(site, name)

    def has_batched() -> bool:
        after = batch_counts(site, name)
        return any(after[size] > before.get(size, 0) for size in after if size != "1")

    # min_batch makes batches of several certain, once they are proven behind the first requests; with so many clients
    # it is only the last who wait.
    site.manage("PUT", f"/models/{name}?batch_size=8&min_batch=3&max_batch_delay=200")
    try:
        for _ in range(20):
            at_once([lambda own=slice(i, None, CLIENTS): ask(own) for i in range(CLIENTS)])  # type: ignore[misc]
            if has_batched():
                break
    finally:
        site.manage("PUT", f"/models/{name}?batch_size=1&min_batch=1&max_batch_delay=100")
    assert has_batched()


def test_digits_are_recognised(site: Server, digits: torch.nn.Module) -> None:
    _, (pictures, truth) = digits_split()

    def guess(own: slice) -> list[int]:
        with site.client() as client:
            scores = [client.predict("digits", picture.tolist()).json for picture in pictures[own]]
        return [max(range(10), key=row.__getitem__) for row in scores]

    guesses = at_once([lambda own=slice(i, None, 4): guess(own) for i in range(4)])  # type: ignore[misc]
    right = sum(guess == digit for i in range(4) for guess, digit in zip(guesses[i], truth[i::4].tolist(), strict=True))
    assert right / len(truth) >= 0.97


def test_pictures_get_the_labels_and_probabilities_of_torch(site: Server, tmp_path: Path) -> None:
    sample = write_sample_picture(tmp_path / "kitten.jpg").read_bytes()
    for picture in (sample, *(photo(SEED + i) for i in range(3))):
        answer = site.ask("PUT", "/predictions/pictures", picture)
        assert answer.status == 200, answer.body
        expected = labelled(picture)
        assert list(answer.json) == list(expected)
        assert answer.json == pytest.approx(expected, abs=1e-5)


def test_a_corrupt_picture_fails_alone_among_seven_good_ones(site: Server) -> None:
    pictures = [photo(SEED + i, 64 + i) for i in range(7)]
    corrupt = photo(SEED)[:300]
    before = batch_counts(site, "pictures")
    # The seven make one batch: no worker starts before they are all there.
    site.manage("PUT", f"/models/pictures?batch_size=8&min_batch=7&max_batch_delay={int(LIMIT_S * 1000)}")
    try:
        wait_for_batches(site, "pictures", 8)
        *good, bad = at_once([
            lambda body=body: site.ask("POST", "/predictions/pictures", body)  # type: ignore[misc]
            for body in (*pictures, corrupt)
        ])  # fmt: skip
    finally:
        site.manage("PUT", "/models/pictures?batch_size=1&min_batch=1&max_batch_delay=100")
    assert [answer.status for answer in good] == [200] * 7
    assert all(
        answer.json == pytest.approx(labelled(picture), abs=1e-5)
        for answer, picture in zip(good, pictures, strict=True)
    )
    assert (bad.status, bad.json["type"]) == (400, "BadRequestException")
    assert "picture" in bad.json["message"]
    after = batch_counts(site, "pictures")
    grown = {size: count - before.get(size, 0) for size, count in after.items() if count != before.get(size, 0)}
    assert sum(grown.values()) == 1


def test_scaling_and_settings_change_under_load_without_a_wrong_answer(site: Server) -> None:
    with Load(site, "linear", Linear(), (4,)) as load:
        load.wait_for_more(20)
        for query in (
            "min_worker=3&synchronous=true",
            "batch_size=8&max_batch_delay=20",
            "min_worker=2&synchronous=true",
            "batch_size=3&min_batch=2&max_batch_delay=5&response_timeout=60",
            "batch_size=1&min_batch=1&max_batch_delay=100&response_timeout=120",
            "min_worker=1&synchronous=true",
        ):
            site.manage("PUT", f"/models/linear?{query}")
            load.wait_for_more(40)
    assert load.wrong == []
    described = site.describe("linear")
    assert [worker["status"] for worker in described["workers"]] == ["READY"]
    assert (described["batchSize"], described["maxBatchDelay"], described["minWorkers"]) == (1, 100, 1)


def test_a_lone_client_does_not_wait_for_a_batch_to_fill(site: Server) -> None:
    count = 30
    # One that waited for others would wait for an hour.
    site.manage("PUT", "/models/linear?batch_size=8&max_batch_delay=3600000")
    try:
        before = batch_counts(site, "linear")
        with site.client() as client:
            for number in range(count):
                assert client.predict("linear", [number, 0, 0, 0]).status == 200
        after = batch_counts(site, "linear")
        assert after["1"] - before.get("1", 0) == count
    finally:
        site.manage("PUT", "/models/linear?batch_size=1&max_batch_delay=100")


# --- management -------------------------------------------------------------------------------------------------------


def test_versions_live_beside_each_other_and_the_default_moves(site: Server) -> None:
    item = [1.0, 2.0, 3.0, 4.0]
    first, second = (answers_of(Linear(seed), torch.tensor([item]))[0] for seed in (0, 2))
    answer = site.manage("POST", "/models?url=linear-2.mar&initial_workers=1")
    assert answer["status"] == 'Model "linear" Version: 2.0 registered with 1 initial workers'
    assert_close(site.predict("linear", item).json, first)
    assert_close(site.predict("linear/2.0", item).json, second)

    again = site.ask("POST", "/models?url=linear-2.mar", port="management")
    assert (again.status, again.json["type"]) == (409, "ConflictStatusException")
    assert again.json["message"] == "Model version 2.0 is already registered for model linear"

    answer = site.manage("PUT", "/models/linear/2.0/set-default")
    assert answer["status"] == 'Default version successfully updated for model "linear" to "2.0"'
    assert_close(site.predict("linear", item).json, second)
    refused = site.ask("DELETE", "/models/linear/2.0", port="management")
    assert (refused.status, refused.json["message"]) == (403, "Cannot remove default version for model linear")

    site.manage("PUT", "/models/linear/1.0/set-default")
    assert {each["modelVersion"] for each in site.manage("GET", "/models/linear/all")} == {"1.0", "2.0"}
    assert site.manage("DELETE", "/models/linear/2.0")["status"] == 'Model "linear" unregistered'
    gone = site.predict("linear/2.0", item)
    assert (gone.status, gone.json["type"]) == (404, "ModelVersionNotFoundException")
    assert_close(site.predict("linear/1.0", item).json, first)


def test_a_model_without_workers_says_so_and_which_call_helps(site: Server) -> None:
    scaled = site.manage("PUT", "/models/linear?min_worker=0&synchronous=true")
    assert scaled["status"] == "Workers scaled to 0 for model: linear"
    refused = site.predict("linear", [0, 0, 0, 0])
    assert (refused.status, refused.json["type"]) == (503, "ServiceUnavailableException")
    assert refused.json["message"] == (
        'Model "linear" has no worker to serve inference request. Please use scale workers API to add workers. '
        "If this is a sequence inference, please check if it is closed, or expired; or exceeds maxSequenceJobQueueSize"
    )
    assert refused.detail["reason"] == "no worker"
    assert refused.detail["fix"].startswith("PUT /models/linear?min_worker=1")
    assert int(refused.headers["retry-after"]) >= 1
    assert site.ask("GET", "/ping").status == 200  # nothing is broken: none are wanted
    site.manage("PUT", "/models/linear?min_worker=1&synchronous=true")
    assert site.predict("linear", [0, 0, 0, 0]).status == 200


def test_a_failed_registration_leaves_nothing_behind(site: Server) -> None:
    (site.store / "damaged.mar").write_bytes((site.store / "linear.mar").read_bytes()[:700])
    refused = site.ask("POST", "/models?url=damaged.mar&initial_workers=1", port="management")
    assert (refused.status, refused.json["type"]) == (400, "InvalidModelException")
    assert refused.json["message"].startswith("damaged.mar")
    absent = site.ask("POST", "/models?url=absent.mar", port="management")
    assert (absent.status, absent.json["message"]) == (404, "Model not found at: absent.mar")
    names = {each["modelName"] for each in site.manage("GET", "/models")["models"]}
    assert names >= {"linear", "burn", "pictures"}
    assert "damaged" not in names
    assert site.ask("GET", "/ready").status == 200


@needs_curl
def test_the_calls_of_the_tutorial_work_with_curl(site: Server, tmp_path: Path) -> None:
    def curl(*arguments: str) -> Any:
        done = subprocess.run(
            ["curl", "-sS", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=True
        )
        return json.loads(done.stdout)

    write_sample_picture(tmp_path / "kitten.jpg")
    expected = labelled((tmp_path / "kitten.jpg").read_bytes())
    management = site.url("management")
    assert curl(f"{site.url()}/predictions/pictures", "-T", "kitten.jpg") == pytest.approx(expected, abs=1e-5)
    assert {"modelName": "pictures", "modelUrl": "pictures.mar"} in curl(f"{management}/models")["models"]
    assert curl("-X", "PUT", f"{management}/models/pictures?min_worker=3")["status"] == "Processing worker updates..."
    changed = curl("-X", "PUT", f"{management}/models/pictures?batch_size=8&max_batch_delay=20")["changed"]
    assert changed == {"batch_size": "1 -> 8", "max_batch_delay": "100 -> 20"}
    curl("-X", "PUT", f"{management}/models/pictures?min_worker=1&synchronous=true&batch_size=1&max_batch_delay=100")
    assert len(site.describe("pictures")["workers"]) == 1


@needs_curl
def test_the_line_that_start_prints_works_as_pasted(server: Server) -> None:
    # Started by hand, in a folder with a blank in its name.
    write_linear(server.store, "m")
    folder = server.folder / "a cache"
    server.environment["PYSERVE_CACHE"] = str(folder)
    started = server.start("--models", "m.mar")
    line = started.stdout.splitlines()[-1]
    assert shlex.split(line)[0] == "curl"
    pasted = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert len(json.loads(pasted.stdout)) == 3


# --- health, metrics --------------------------------------------------------------------------------------------------


def test_a_healthy_server_says_so(site: Server) -> None:
    ping = site.ask("GET", "/ping")
    assert (ping.status, ping.body) == (200, b'{\n  "status": "Healthy"\n}\n')
    assert site.ask("GET", "/ready").json == {"status": "Ready"}
    assert site.ask("GET", "/live").json == {"status": "Live"}


def test_the_counters_agree_with_what_was_sent(site: Server) -> None:
    """Every request is counted once: by the status of its answer, or as aborted."""
    site.manage("POST", "/models?url=burn.mar&model_name=counted&initial_workers=1")
    labels = {"model": "counted", "version": "1.0"}
    try:
        with site.client() as client:
            for number in range(10):
                assert client.predict("counted", [number, 1]).json == [number]
            for _ in range(3):
                assert client.predict("counted", [1, 2, 3]).status == 400
        abandoned = site.connect()
        body = json.dumps([7, 20_000]).encode()
        abandoned.sendall(
            b"POST /predictions/counted HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        site.wait_for(lambda: site.metric("pyserve_requests_in_flight", **labels) == 1, "the request to arrive")
        # A reset: whoever only closes its sending half may still be reading.
        abandoned.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        abandoned.close()
        site.wait_for(lambda: site.metric("pyserve_requests_aborted_total", **labels) == 1, "the client to be missed")
        site.manage("PUT", "/models/counted?min_worker=0&synchronous=true")
        for _ in range(2):
            assert site.predict("counted", [1, 1]).status == 503

        def answered(status: str) -> float:
            return site.metric("pyserve_requests_total", status=status, **labels)

        assert (answered("200"), answered("400"), answered("503")) == (10, 3, 2)
        assert site.metric("pyserve_requests_total", **labels) == 15
        assert site.metric("pyserve_requests_rejected_total", model="counted", reason="no worker") == 2
        assert site.metric("pyserve_request_duration_seconds_count", **labels) == 15
        assert site.metric("pyserve_request_duration_seconds_bucket", le="+Inf", **labels) == 15
        assert site.metric("pyserve_request_duration_seconds_sum", **labels) > 0
        assert site.metric("pyserve_submitted_total", **labels) == 11
        assert site.metric("pyserve_queue_duration_seconds_count", **labels) == 11
        batches = site.metric("pyserve_batches_total", **labels)
        assert batches == site.metric("pyserve_batch_size_count", **labels)
        assert site.metric("pyserve_batch_size_sum", **labels) == 11
        assert site.metric("pyserve_inference_duration_seconds_count", **labels) == batches
        assert site.metric("pyserve_preprocess_duration_seconds_count", **labels) >= 11  # bad input is looked at too
        assert site.metric("pyserve_preprocess_duration_seconds_sum", **labels) > 0
        assert 0 < site.metric("pyserve_postprocess_duration_seconds_count", **labels) <= batches
        assert site.metric("ts_inference_requests_total", model_name="counted") == 16  # the abandoned one as well
        assert site.metric("pyserve_requests_in_flight", **labels) == 0
    finally:
        site.manage("DELETE", "/models/counted")
    assert site.metric("pyserve_requests_total", **labels) == 0


# --- what it takes, and what it gives away ----------------------------------------------------------------------------


def burn(client: Client, model: str, rounds: int) -> None:
    assert client.predict(model, [1, rounds]).json == answers_of(Burn(), torch.tensor([[1.0, 1.0]]))[0].tolist()


def test_threads_and_descriptors_come_back_after_scaling_down_and_unregistering(site: Server) -> None:
    process = site.process

    def cycle() -> None:
        site.manage("POST", "/models?url=burn.mar&model_name=passing&initial_workers=1")
        site.manage("PUT", "/models/passing?min_worker=4&synchronous=true")
        at_once([lambda: burn_once("passing") for _ in range(4)])
        site.manage("PUT", "/models/passing?min_worker=1&synchronous=true")
        site.manage("DELETE", "/models/passing")

    def burn_once(model: str) -> None:
        with site.client() as client:
            burn(client, model, 10)

    cycle()  # fills the thread pools, which stay
    threads, descriptors = process.num_threads(), process.num_fds()
    for _ in range(3):
        cycle()
    site.wait_for(lambda: process.num_threads() <= threads, f"{threads} threads")
    site.wait_for(lambda: process.num_fds() <= descriptors, f"{descriptors} descriptors")


def test_workers_share_one_copy_of_the_weights(site: Server) -> None:
    write_torchscript(site.store, Wide(), "wide", config={"input": {"dtype": "float32", "shape": [4]}})
    site.manage("POST", "/models?url=wide.mar&initial_workers=1")

    def resident_after_load() -> int:
        with site.client() as client:
            for _ in range(5):
                assert client.predict("wide", [1, 1, 1, 1]).json == [16_000]
        return int(site.process.memory_info().rss)

    try:
        one = resident_after_load()
        site.manage("PUT", "/models/wide?min_worker=4&synchronous=true")
        four = resident_after_load()
        # A copy each would be 192 MB more, of a few hundred.
        assert four / one <= 1.25
    finally:
        site.manage("DELETE", "/models/wide")


def test_only_loopback_is_listened_on(site: Server) -> None:
    listening = {
        (each.laddr.ip, each.laddr.port) for each in site.process.net_connections() if each.status == psutil.CONN_LISTEN
    }
    assert listening == {site.address(name) for name in ("inference", "management", "metrics")}
    assert {host for host, _ in listening} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("port", "path"),
    [
        *itertools.product(["inference", "metrics"], ["/models", "/models/linear", "/models/linear/1.0/set-default"]),
        *itertools.product(["management", "metrics"], ["/predictions/linear", "/ping"]),
        *itertools.product(["inference", "management"], ["/metrics"]),
    ],
)
def test_a_port_does_not_answer_another_ports_paths(site: Server, port: str, path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        answer = site.ask(method, path, b"[0, 0, 0, 0]", JSON, port=port)
        assert (answer.status, answer.json["type"]) == (404, "ResourceNotFoundException")
