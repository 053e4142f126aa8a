"""What handlers emit, as TorchServe's /metrics was seen to show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyserve.telemetry.custom_metrics import Dimension, MetricsCache, MetricTypes

STAGE = [Dimension("Stage", "pre")]
OF_THE_MODEL = {"ModelName": "m", "Level": "Model"}


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (lambda cache: cache.add_error("E", 1), [(1.0, {"Level": "Error"})]),
        (lambda cache: cache.add_error("E", 1, STAGE), [(1.0, {"Stage": "pre", "Level": "Error"})]),
        (lambda cache: cache.add_counter("C", 2, 0, STAGE), [(2.0, {"Stage": "pre", **OF_THE_MODEL})]),
        (lambda cache: cache.add_counter("C", -2), []),
        (lambda cache: cache.add_metric_to_cache("C", "count", ["A"]).update(-1, "", [Dimension("A", "a")]), []),
        (lambda cache: cache.add_metric_to_cache("C", "count", ["A"]).add_or_update(-1, ["a"]), []),
        (lambda cache: cache.add_metric_to_cache("C", "count", ["A"]).update(1, "", [Dimension("A", "a")]),
         [(1.0, {"A": "a"})]),
    ],
)  # fmt: skip
def test_values_and_labels(call: Callable[[MetricsCache], Any], shown: list[tuple[float, dict[str, str]]]) -> None:
    cache = MetricsCache("m")
    call(cache)
    assert [(each["value"], each["dimensions"]) for each in cache.drain()] == shown


def test_a_metric_that_was_emitted_is_found_and_emits_more() -> None:
    cache = MetricsCache("m")
    cache.add_time("Took", 1.5, unit="s", dimensions=STAGE)
    found = cache.get_metric("Took", MetricTypes.GAUGE)
    assert (found.unit, found.dimension_names) == ("Seconds", ["Stage", "ModelName", "Level"])
    found.add_or_update(2, ["pre", "m", "Model"])
    [emitted] = cache.drain()
    assert emitted["value"] == 2.0
