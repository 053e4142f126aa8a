"""What audits found, for a scrape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client.metrics_core import Metric


def audit_families(models: Iterable[Any]) -> Iterator[Metric]:
    """Of models as `Metrics` is given them."""
    requests = Metric("pyserve_audit_requests", "Requests run again and compared.", "counter")
    differences = Metric("pyserve_audit_differences", "Requests whose answer differed when run again.", "counter")
    skipped = Metric("pyserve_audit_skipped", "Requests chosen for the audit that were not run again.", "counter")
    for model in models:
        report = model.audit_report()
        if report is None:
            continue
        labels = {"model": model.name, "version": model.version}
        requests.add_sample("pyserve_audit_requests_total", labels, report["requests"])
        differences.add_sample("pyserve_audit_differences_total", labels, report["differences"])
        for reason, count in report["skipped"].items():
            skipped.add_sample("pyserve_audit_skipped_total", {**labels, "reason": reason}, count)
    yield from (requests, differences, skipped)
