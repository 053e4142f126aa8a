"""What /metrics says, read back with Prometheus' own parser."""

from __future__ import annotations

import re
import socket
from collections import Counter
from typing import Any, NamedTuple

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from pyserve.request.messages import Request
from pyserve.telemetry.metrics import CLASS_NAMES, REQUEST_BOUNDS_S, TORCHSERVE_NAMES, Metrics

BOUNDS = [0.1, 1.0]


class FakeRow(NamedTuple):
    status: str


class FakeModel:
    lane = "native"
    native_devices: tuple[str, ...] = ()

    def __init__(self, name: str = "m", version: str = "1.0"):
        self.name = name
        self.version = version
        self.requests_in_flight = 4
        self.audited: dict[str, Any] | None = None
        self.measured: dict[str, Any] = {
            "queue": (BOUNDS, [1, 2, 3], 9.5),
            "staging": (BOUNDS, [6, 0, 0], 0.25),
            "inference": (BOUNDS, [0, 0, 0], 0.0),
            "batch_size": ([1.0, 2.0], [5, 1, 0], 7.0),
            "submitted": 10, "batches": 6, "failed": 1, "expired": 2, "cancelled": 3, "retried_singly": 4,
            "staging_fallback": 5, "running": 1, "queue_size": 7,
        }  # fmt: skip

    def worker_rows(self) -> list[FakeRow]:
        return [FakeRow("READY"), FakeRow("UNLOADING"), FakeRow("READY")]

    def worker_load_ms(self) -> dict[str, float]:
        return {f"W-9000-{self.name}_{self.version}": 12.0}

    def stats(self) -> dict[str, Any]:
        return self.measured

    def audit_report(self) -> dict[str, Any] | None:
        return self.audited


PLAIN_COUNTERS = (*CLASS_NAMES, *TORCHSERVE_NAMES)


def samples(metrics: Metrics, *names: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """(sample name, label values) -> value, as Prometheus reads it."""
    found = {}
    for family in text_string_to_metric_families(metrics.render(names).decode()):
        for sample in family.samples:
            # The parser gives every counter the ending that TorchServe's do not have.
            plain = sample.name.removesuffix("_total")
            key = (plain if plain in PLAIN_COUNTERS else sample.name, tuple(sample.labels.values()))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def served(*models: FakeModel) -> Metrics:
    return Metrics(lambda: models, hostname="h", torch_version="2.13")


@pytest.mark.parametrize(
    "name, labels, value",
    [
        ("pyserve_queue_duration_seconds_bucket", ("m", "1.0", "0.1"), 1),
        ("pyserve_queue_duration_seconds_bucket", ("m", "1.0", "1.0"), 3),
        ("pyserve_queue_duration_seconds_bucket", ("m", "1.0", "+Inf"), 6),
        ("pyserve_queue_duration_seconds_count", ("m", "1.0"), 6),
        ("pyserve_queue_duration_seconds_sum", ("m", "1.0"), 9.5),
        ("pyserve_staging_duration_seconds_count", ("m", "1.0"), 6),
        ("pyserve_inference_duration_seconds_count", ("m", "1.0"), 0),
        ("pyserve_batch_size_bucket", ("m", "1.0", "2.0"), 6),
        ("pyserve_batch_size_sum", ("m", "1.0"), 7),
        ("pyserve_submitted_total", ("m", "1.0"), 10),
        ("pyserve_batches_total", ("m", "1.0"), 6),
        ("pyserve_failed_total", ("m", "1.0"), 1),
        ("pyserve_expired_total", ("m", "1.0"), 2),
        ("pyserve_cancelled_total", ("m", "1.0"), 3),
        ("pyserve_retried_singly_total", ("m", "1.0"), 4),
        ("pyserve_staging_fallback_total", ("m", "1.0"), 5),
        ("pyserve_queue_size", ("m", "1.0"), 7),
        ("pyserve_batches_running", ("m", "1.0"), 1),
        ("pyserve_requests_in_flight", ("m", "1.0"), 4),
        ("pyserve_workers", ("m", "1.0", "native"), 2),
    ],
)
def test_what_a_model_measures_is_there(name: str, labels: tuple[str, ...], value: float) -> None:
    assert samples(served(FakeModel()))[name, labels] == value


def test_requests_are_counted_by_status_and_duration() -> None:
    metrics = served(FakeModel())
    for status, duration_s in ((200, 0.01), (200, 0.0101), (400, 0.0), (504, 1000.0)):
        metrics.observe_request("m", "1.0", status, duration_s)
    found = samples(metrics)
    assert found["pyserve_requests_total", ("m", "1.0", "200")] == 2
    assert found["pyserve_requests_total", ("m", "1.0", "504")] == 1
    buckets = [found["pyserve_request_duration_seconds_bucket", ("m", "1.0", le)] for le in ("0.005", "0.01", "0.025")]
    assert buckets == [1, 2, 3]  # a bucket holds its upper bound
    assert found["pyserve_request_duration_seconds_bucket", ("m", "1.0", "+Inf")] == 4
    assert found["pyserve_request_duration_seconds_sum", ("m", "1.0")] == pytest.approx(1000.0201)
    assert list(REQUEST_BOUNDS_S) == sorted(REQUEST_BOUNDS_S)


def test_torchserves_counters_have_its_labels_and_units() -> None:
    metrics = served(FakeModel())
    metrics.observe_request("m", "1.0", 200, 0.5, queue_s=0.25)
    metrics.observe_request("m", "1.0", 503, 0.25)
    metrics.observe_request("m", "1.0", 200, 1.0, url_version="1.0")
    found = samples(metrics)
    assert found["ts_inference_requests_total", ("m", "default", "h")] == 2
    assert found["ts_inference_latency_microseconds", ("m", "default", "h")] == 750_000
    assert found["ts_queue_latency_microseconds", ("m", "default", "h")] == 250_000
    assert found["ts_inference_requests_total", ("m", "1.0", "h")] == 1


def test_torchserves_lines_are_written_as_it_writes_them() -> None:
    metrics = served(FakeModel())
    for _ in range(8):
        metrics.observe_answer(200)
    text = metrics.render(["Requests2XX"]).decode()
    assert text == (
        "# HELP Requests2XX Torchserve prometheus counter metric with unit: Count\n"
        "# TYPE Requests2XX counter\n"
        'Requests2XX{Level="Host",Hostname="h",} 8.0\n'
    )


@pytest.mark.parametrize(
    "status, name",
    [(200, "Requests2XX"), (206, "Requests2XX"), (404, "Requests4XX"), (499, "Requests4XX"), (500, "Requests5XX"),
     (503, "Requests5XX"), (302, "Requests5XX")],
)  # fmt: skip
@pytest.mark.parametrize("is_prediction", [False, True])
def test_answer_counts_in_one_class(status: int, name: str, is_prediction: bool) -> None:
    metrics = served(FakeModel())
    if is_prediction:
        metrics.observe_request("m", "1.0", status, 0.0)
    else:
        metrics.observe_answer(status)
    counted = {key[0]: value for key, value in samples(metrics).items() if key[0].startswith("Requests")}
    assert counted == {**dict.fromkeys(("Requests2XX", "Requests4XX", "Requests5XX"), 0), name: 1}


def test_refusals_and_aborts_are_counted_by_reason() -> None:
    metrics = served(FakeModel())
    for reason in ("queue full", "queue full", "no worker"):
        metrics.observe_rejection("m", reason)
    metrics.observe_abort("m", "1.0")
    found = samples(metrics)
    assert found["pyserve_requests_rejected_total", ("m", "queue full")] == 2
    assert found["pyserve_requests_rejected_total", ("m", "no worker")] == 1
    assert found["pyserve_requests_aborted_total", ("m", "1.0")] == 1


def test_answers_of_the_protocol_itself_are_summed_over_the_listeners() -> None:
    metrics = served()
    metrics.refused += [Counter({400: 2, 413: 1}), Counter({400: 3})]
    found = samples(metrics)
    assert found["pyserve_http_refused_total", ("400",)] == 5
    assert found["pyserve_http_refused_total", ("413",)] == 1


def test_names_filter_samples_exactly() -> None:
    metrics = served(FakeModel())
    query = "name[]=pyserve_queue_size&name%5B%5D=pyserve_batch_size_sum&name[]=pyserve_batch"
    response = metrics.scrape(Request("GET", "/metrics", query=query))
    families = list(text_string_to_metric_families(bytes(response.body).decode()))
    assert [sample.name for family in families for sample in family.samples] == [
        "pyserve_batch_size_sum", "pyserve_queue_size",
    ]  # fmt: skip
    assert metrics.render(["nothing"]) == b""


def test_unregistered_model_takes_its_series_along_and_starts_again_from_nothing() -> None:
    models = [FakeModel("m"), FakeModel("n")]
    metrics = Metrics(lambda: models, hostname="h")
    for model in ("m", "n"):
        metrics.observe_request(model, "1.0", 200, 0.1, url_version="1.0")
        metrics.observe_request(model, "1.0", 200, 0.1)
        metrics.observe_rejection(model, "queue full")
        metrics.observe_abort(model, "1.0")
    gone = models.pop(0)
    assert not any("m" in labels for _, labels in samples(metrics))
    assert samples(metrics)["Requests2XX", ("Host", "h")] == 4  # these belong to the host and never go back
    models.append(gone)
    metrics.observe_request("m", "1.0", 200, 0.1)
    found = samples(metrics)
    assert found["pyserve_requests_total", ("m", "1.0", "200")] == 1
    assert found["pyserve_requests_total", ("n", "1.0", "200")] == 2


def test_two_versions_share_the_default_label_of_torchserves_counters() -> None:
    metrics = served(FakeModel("m", "1.0"), FakeModel("m", "2.0"))
    metrics.observe_request("m", "1.0", 200, 0.1)
    metrics.observe_request("m", "2.0", 200, 0.1)
    found = samples(metrics)
    assert found["ts_inference_requests_total", ("m", "default", "h")] == 2
    assert found["pyserve_requests_total", ("m", "2.0", "200")] == 1


def test_model_without_a_lane_has_no_histograms_yet() -> None:
    model = FakeModel()
    model.measured = {}
    found = samples(served(model))
    assert ("pyserve_queue_size", ("m", "1.0")) not in found
    assert found["pyserve_workers", ("m", "1.0", "native")] == 2


def test_label_values_are_escaped() -> None:
    name = 'a"b\\c\nd'
    metrics = served(FakeModel(name))
    assert samples(metrics)["pyserve_queue_size", (name, "1.0")] == 7


def test_families_without_samples_still_have_help_and_type() -> None:
    text = served().render().decode()
    for name, kind in (("pyserve_requests_total", "counter"), ("ts_queue_latency_microseconds", "counter"),
                       ("pyserve_batch_size", "histogram"), ("pyserve_workers", "gauge")):  # fmt: skip
        assert f"# TYPE {name} {kind}\n" in text


def test_build_and_process_are_described() -> None:
    found = samples(served())
    [key] = [key for key in found if key[0] == "pyserve_build_info"]
    assert "2.13" in key[1] and found[key] == 1
    assert found["process_resident_memory_bytes", ()] > 1e6
    assert found["process_cpu_seconds_total", ()] > 0


def test_metrics_are_a_collector_for_other_registries() -> None:
    registry = CollectorRegistry()
    registry.register(served(FakeModel()))
    assert registry.get_sample_value("pyserve_queue_size", {"model": "m", "version": "1.0"}) == 7


def emitted(kind: str, name: str, value: float, **dimensions: str) -> dict[str, Any]:
    return {"type": kind, "name": name, "value": value, "unit": "count", "dimensions": dimensions}


def test_the_text_is_valid_whatever_handlers_emit() -> None:
    metrics, host = served(FakeModel("a"), FakeModel("b")), socket.gethostname()
    metrics.observe_custom("a", [
        emitted("COUNTER", "seen", 2, Level="Model"), emitted("GAUGE", "seen", 9), emitted("COUNTER", "Requests2XX", 5),
        emitted("GAUGE", "pyserve_queue_size", 7), emitted("GAUGE", "odd", 1, **{"a-b": "x"}),
        emitted("GAUGE", "odd", 2, a_b="x"), emitted("COUNTER", "order", 1, x="1", y="2"),
    ])  # fmt: skip
    metrics.observe_custom("b", [
        emitted("COUNTER", "seen", 3, Level="Model"), emitted("COUNTER", "order", 1, y="2", x="1"),
    ])  # fmt: skip
    text = metrics.render().decode()
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(names) == len(set(names))
    samples = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(samples) == len(set(samples))
    assert f'seen{{Level="Model",Hostname="{host}",}} 5.0' in text and f'odd{{a_b="x",Hostname="{host}",}} 2.0' in text
    assert f'order{{x="1",y="2",Hostname="{host}",}} 2.0' in text
    assert not re.search(r"^pyserve_queue_size\{Hostname", text, re.MULTILINE)
    list(text_string_to_metric_families(text))
