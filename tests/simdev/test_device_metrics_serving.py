"""What operators see of accelerators on a real server with two simulated ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.simdev.device import real_accelerator
from tests.simdev.serving import give_device
from tests.support import handler_archives, serving_models
from tests.support.serving import Server

pytestmark = [pytest.mark.server, pytest.mark.accelerator]
REQUESTS = 20


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`linear` on both devices, `own` in a worker process."""
    if real_accelerator() is not None:
        pytest.skip("torch has a real accelerator, and knows no second one beside it")
    server = Server(tmp_path_factory.mktemp("device-metrics"))
    give_device(server, at_start="memory bytes=64000000")
    serving_models.write_linear(server.store)
    handler_archives.write_handler(server.store, "own", handler_archives.ECHO)
    server.environment["PYSERVE_METRIC_TIME_INTERVAL"] = "1"
    server.start("--models", "linear.mar", "own.mar")
    try:
        for number in range(REQUESTS):
            assert server.predict("linear", [float(number), 2.0, 3.0, 4.0]).status == 200
        yield server
    finally:
        server.kill()


def shown(server: Server) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Name of a sample -> (labels, value) of each."""
    text = server.ask("GET", "/metrics", port="metrics").body.decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_the_memory_of_each_device_is_shown(served: Server) -> None:
    by_device: dict[str, dict[str, float]] = {}
    for labels, value in shown(served)["pyserve_device_memory_bytes"]:
        by_device.setdefault(labels["device"], {})[labels["kind"]] = value
    assert set(by_device) == set(served.describe("linear")["devices"]) == {"simdev:0", "simdev:1"}
    for kinds in by_device.values():
        assert 0 < kinds["allocated"] <= kinds["reserved"] and 0 < kinds["free"] < 64_000_000


def test_the_stages_of_all_batches_are_timed(served: Server) -> None:
    metrics = shown(served)
    batches = sum(value for labels, value in metrics["pyserve_batches_total"] if labels["model"] == "linear")
    counts = {
        labels["stage"]: value for labels, value in metrics["pyserve_device_stage_duration_seconds_count"]
        if labels["model"] == "linear"
    }  # fmt: skip
    assert batches == REQUESTS
    assert {stage: counts[stage] for stage in ("h2d", "compute", "d2h")} == dict.fromkeys(
        ("h2d", "compute", "d2h"), batches
    )
    assert counts["gap"] < batches


def test_what_is_counted_of_a_model_on_a_device_is_shown_of_no_other(served: Server) -> None:
    metrics = shown(served)
    for name in (
        "pyserve_pinned_bytes",
        "pyserve_device_slot_bytes",
        "pyserve_pageable_copies_total",
        "pyserve_batch_ceiling",
    ):
        assert [labels["model"] for labels, _ in metrics[name]] == ["linear"], name
    assert metrics["pyserve_pageable_copies_total"][0][1] == 0 < metrics["pyserve_pinned_bytes"][0][1]
    assert "pyserve_device_losses" not in metrics


def test_torchserves_gauges_have_the_memory_of_each_device(served: Server) -> None:
    served.wait_for(lambda: "GPUMemoryUsed" in shown(served), "the gauges of the system")
    metrics = shown(served)
    assert {labels["DeviceId"] for labels, _ in metrics["GPUMemoryUsed"]} == {"0", "1"}
    assert all(0 < value < 64_000_000 / (1 << 20) for _, value in metrics["GPUMemoryUsed"])
    assert all(0 < value < 100 for _, value in metrics["GPUMemoryUtilization"])
    assert "GPUUtilization" not in metrics, "nobody knows it"


def test_a_description_names_devices_and_usage(served: Server) -> None:
    described: dict[str, Any] = served.describe("linear")
    assert described["deviceType"] == "gpu" and "batchCeiling" not in described
    usages = {worker["gpuUsage"].split()[0] for worker in described["workers"]}
    assert usages == {"gpuId::0", "gpuId::1"}
    assert all("utilization.gpu::[N/A]" in worker["gpuUsage"] for worker in described["workers"])
    assert "devices" not in served.describe("own")


def test_two_batches_at_once_do_not_make_a_worker_busier_than_always(served: Server) -> None:
    shares = [value for labels, value in shown(served)["pyserve_worker_utilization"] if labels["model"] == "linear"]
    assert len(shares) == 1 and 0 <= shares[0] <= 1
