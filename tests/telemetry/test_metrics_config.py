"""metrics.yaml, the machine's metrics, and the gauges for autoscalers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyserve.telemetry.load_gauges import LoadGauges
from pyserve.telemetry.metrics_config import Declared, MetricsConfigError, read_metrics_config
from pyserve.telemetry.system_metrics import measure, parse_lines

GOOD = """
dimensions:
  - &model_name "ModelName"
  - &level "Level"
ts_metrics:
  counter:
    - {name: Requests2XX, unit: Count, dimensions: [*level, Hostname]}
model_metrics:
  gauge:
    - {name: HandlerTime, unit: ms, dimensions: [*model_name, *level]}
  histogram:
"""


def test_anchors_and_units_are_kept(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(GOOD)
    config = read_metrics_config(str(tmp_path / "m.yaml"))
    assert config.server == {"Requests2XX": Declared("counter", "Requests2XX", "Count", ("Level", "Hostname"))}
    assert config.model == (Declared("gauge", "HandlerTime", "ms", ("ModelName", "Level")),)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("a: [", "is not YAML"),
        ("- 1", "line 1: the file must be a mapping"),
        ("model_metric: {}", "line 1: unknown key 'model_metric'; there are dimensions, ts_metrics and model_metrics"),
        ("model_metrics:\n  timer: []", "line 2: model_metrics: unknown kind 'timer'"),
        ("model_metrics:\n  gauge: 1", "line 2: model_metrics.gauge must be a list"),
        ("model_metrics:\n  gauge:\n  - {name: a}", "line 3: model_metrics.gauge: a metric needs a unit"),
        ("model_metrics:\n  gauge:\n  - {name: '', unit: b}", "line 3: model_metrics.gauge: a metric needs a name"),
        ("model_metrics:\n  gauge:\n  - {name: a, unit: b, help: c}", "unknown key 'help'"),
        ("model_metrics:\n  gauge:\n  - {name: a, unit: b}\n  - {name: a, unit: b}", "line 4: model_metrics.gauge: a"),
        ("ts_metrics:\n  gauge:\n  - {name: QueueTime, unit: ms, dimensions: [Level]}",
         "line 3: ts_metrics.gauge: QueueTime has 2 dimensions (Level, Hostname), not 1"),
    ],
)  # fmt: skip
def test_errors_name_line_and_key(tmp_path: Path, text: str, wanted: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(MetricsConfigError) as caught:
        read_metrics_config(str(tmp_path / "m.yaml"))
    assert wanted in str(caught.value)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MetricsConfigError, match="cannot be read"):
        read_metrics_config(str(tmp_path / "none.yaml"))


def test_the_machine_is_measured() -> None:
    values = measure()
    assert len(values) == 7 and values["MemoryUsed"] > 0 and 0 <= values["CPUUtilization"] <= 100


def test_lines_of_a_command_are_read() -> None:
    text = (
        "[METRICS]MemoryUsed.Megabytes:10|#Level:Host|#hostname:h,1\nnoise\nRequests2XX.Count:1|#Level:Host|#h\n"
        "GPUUtilization.Percent:5|#Level:Host,DeviceId:1|#hostname:h,1\nDiskUsage.Gigabytes:e|#Level:Host|#h\n"
    )
    assert parse_lines(text) == [("MemoryUsed", 10.0, None), ("GPUUtilization", 5.0, 1)]


def test_load_is_of_the_last_seconds() -> None:
    now = 0.0
    gauges = LoadGauges(lambda: now)

    def stats(busy_s: float, batches: int, waiting: int = 0, running: int = 0) -> dict[str, object]:
        return {"staging": ([], [], 0.0), "inference": ([], [], busy_s), "batches": batches, "running": running,
                "batch_size": ([], [], batches * 4.0), "queue_size": waiting}  # fmt: skip

    assert gauges.look(stats(0, 0, 5), 2) == (0.0, 0.0)
    now = 10.0
    assert gauges.look(stats(10, 100, 8), 2) == pytest.approx((0.5, 8 / 4 * 0.1 / 2))
    now = 40.0
    assert gauges.look(stats(10, 100), 2) == (0.0, 0.0)  # what was long ago is forgotten
    now = 60.0
    assert gauges.look(stats(10, 100, 4, running=2), 2)[0] == 1.0  # one batch that runs for long
