"""What a scrape tells of front ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.metrics_core import Metric


def front_end_families(rows: Sequence[tuple[int, int, int, int, int]]) -> Iterator[Metric]:
    """Of each front end: its connections, the requests, those that crossed as tensors, those of them that were read
    natively, and the links so far."""  # fmt: skip
    connections = Metric("pyserve_front_end_connections", "Open connections of a front end.", "gauge")
    requests = Metric("pyserve_front_end_requests", "Requests that came through a front end.", "counter")
    tensors = Metric("pyserve_front_end_tensors", "Those that a front end decoded, so that tensors crossed.", "counter")
    native = Metric("pyserve_front_end_native", "Those of them that a front end read without Python.", "counter")
    links = Metric("pyserve_front_end_links", "Times that a front end has come to the engine.", "counter")
    for number, (connected, passed, crossed, taken, started) in enumerate(rows):
        labels = {"front_end": str(number)}
        connections.add_sample(connections.name, labels, connected)
        requests.add_sample(f"{requests.name}_total", labels, passed)
        tensors.add_sample(f"{tensors.name}_total", labels, crossed)
        native.add_sample(f"{native.name}_total", labels, taken)
        links.add_sample(f"{links.name}_total", labels, started)
    yield from (connections, requests, tensors, native, links)
