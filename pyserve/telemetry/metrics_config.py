"""``metrics.yaml``: names, kinds, units and labels of metrics, as TorchServe's ``metrics_config`` names them.

    dimensions: [&model_name ModelName]      # free; for YAML's anchors
    ts_metrics: {counter: [{name: Requests2XX, unit: Count, dimensions: [Level, Hostname]}]}
    model_metrics: {gauge: [{name: HandlerTime, unit: ms, dimensions: [*model_name, Level]}]}

Without a file, what stands here is in effect: TorchServe's own list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

KINDS = ("counter", "gauge", "histogram")
SECTIONS = ("ts_metrics", "model_metrics")
_KEYS = ("name", "unit", "dimensions")


class MetricsConfigError(Exception):
    """The file cannot be read, or says something that is no metric; the text names file, line and key."""


class Declared(NamedTuple):
    """One metric. ``kind`` is one of KINDS."""

    kind: str
    name: str
    unit: str
    dimensions: tuple[str, ...]


_HOST = ("Level", "Hostname")
_REQUEST = ("model_name", "model_version", "hostname")
_GPU = ("Level", "DeviceId", "Hostname")
SERVER_METRICS = {
    each.name: each
    for each in (
        Declared("counter", "Requests2XX", "Count", _HOST),
        Declared("counter", "Requests4XX", "Count", _HOST),
        Declared("counter", "Requests5XX", "Count", _HOST),
        Declared("counter", "ts_inference_requests_total", "Count", _REQUEST),
        Declared("counter", "ts_inference_latency_microseconds", "Microseconds", _REQUEST),
        Declared("counter", "ts_queue_latency_microseconds", "Microseconds", _REQUEST),
        Declared("gauge", "QueueTime", "Milliseconds", _HOST),
        Declared("gauge", "WorkerThreadTime", "Milliseconds", _HOST),
        Declared("gauge", "WorkerLoadTime", "Milliseconds", ("WorkerName", *_HOST)),
        Declared("gauge", "CPUUtilization", "Percent", _HOST),
        Declared("gauge", "MemoryUsed", "Megabytes", _HOST),
        Declared("gauge", "MemoryAvailable", "Megabytes", _HOST),
        Declared("gauge", "MemoryUtilization", "Percent", _HOST),
        Declared("gauge", "DiskUsage", "Gigabytes", _HOST),
        Declared("gauge", "DiskUtilization", "Percent", _HOST),
        Declared("gauge", "DiskAvailable", "Gigabytes", _HOST),
        Declared("gauge", "GPUMemoryUtilization", "Percent", _GPU),
        Declared("gauge", "GPUMemoryUsed", "Megabytes", _GPU),
        Declared("gauge", "GPUUtilization", "Percent", _GPU),
    )
}
MODEL_METRICS = (
    Declared("gauge", "HandlerTime", "ms", ("ModelName", "Level")),
    Declared("gauge", "PredictionTime", "ms", ("ModelName", "Level")),
)


@dataclass
class MetricsConfig:
    """What is declared.

    Attributes:
        server: by name; those of the server.
        model: those of models and their handlers, without ``Hostname``, which all get.
    """

    server: dict[str, Declared] = field(default_factory=lambda: dict(SERVER_METRICS))
    model: tuple[Declared, ...] = MODEL_METRICS


def read_metrics_config(path: str) -> MetricsConfig:
    """Reads a file; blocks.

    Raises:
        MetricsConfigError: see there.
    """
    try:
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise MetricsConfigError(f"metrics_config={path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise MetricsConfigError(f"metrics_config={path} is not YAML: {' '.join(str(error).split())}") from error
    if root is None:
        return MetricsConfig({}, ())
    sections: dict[str, list[Declared]] = {name: [] for name in SECTIONS}
    for key, node in _pairs(root, path, "the file"):
        if key == "dimensions":
            continue
        if key not in SECTIONS:
            raise _error(path, node, f"unknown key {key!r}; there are dimensions, {' and '.join(SECTIONS)}")
        sections[key] += _section(node, path, key)
    server = {each.name: each for each in sections["ts_metrics"]}
    return MetricsConfig(server, tuple(sections["model_metrics"]))


def _section(node: Any, path: str, section: str) -> Iterator[Declared]:
    seen = set()
    for kind, metrics in _pairs(node, path, section):
        if kind not in KINDS:
            raise _error(path, metrics, f"{section}: unknown kind {kind!r}; there are {', '.join(KINDS)}")
        for entry in _items(metrics, path, f"{section}.{kind}"):
            declared = _declared(entry, path, f"{section}.{kind}", kind, is_server=section == "ts_metrics")
            if declared.name in seen:
                raise _error(path, entry, f"{section}.{kind}: {declared.name} is declared twice")
            seen.add(declared.name)
            yield declared


def _declared(entry: Any, path: str, place: str, kind: str, *, is_server: bool) -> Declared:
    nodes = dict(_pairs(entry, path, f"a metric of {place}"))
    for key, node in nodes.items():
        if key not in _KEYS:
            raise _error(path, node, f"{place}: unknown key {key!r}; a metric has {', '.join(_KEYS)}")
    texts = {}
    for key in ("name", "unit"):
        node = nodes.get(key)
        if node is None or not isinstance(node, yaml.ScalarNode) or not node.value.strip():
            raise _error(path, entry if node is None else node, f"{place}: a metric needs a {key}, text not empty")
        texts[key] = node.value.strip()
    dimensions = []
    for node in _items(nodes["dimensions"], path, f"{place}: dimensions") if "dimensions" in nodes else ():
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise _error(path, node, f"{place}: dimensions of {texts['name']} are names, not empty")
        dimensions.append(node.value)
    built_in = SERVER_METRICS.get(texts["name"]) if is_server else None
    if built_in is not None and len(dimensions) != len(built_in.dimensions):
        raise _error(path, entry, f"{place}: {built_in.name} has {len(built_in.dimensions)} dimensions "
                                  f"({', '.join(built_in.dimensions)}), not {len(dimensions)}")  # fmt: skip
    return Declared(kind, texts["name"], texts["unit"], tuple(dimensions))


def _pairs(node: Any, path: str, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
        return
    if not isinstance(node, yaml.MappingNode):
        raise _error(path, node, f"{place} must be a mapping")
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _error(path, key, f"keys of {place} are text")
        yield key.value, value


def _items(node: Any, path: str, place: str) -> Iterator[Any]:
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
        return
    if not isinstance(node, yaml.SequenceNode):
        raise _error(path, node, f"{place} must be a list")
    yield from node.value


def _error(path: str, node: Any, text: str) -> MetricsConfigError:
    return MetricsConfigError(f"metrics_config={path}, line {node.start_mark.line + 1}: {text}")
