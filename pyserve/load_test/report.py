"""A finished load test as a JSON object, and as rows for people."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from pyserve.load_test.recording import (
    Recording,
    bucket_value,
    encoded,
    highest_at,
    standard_deviation,
    value_at,
)

JsonObject = dict[str, Any]

SCHEMA = 1
PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
LIBRARIES = ("uvloop", "httptools", "torch", "pyserve-torch")
BUSY_SHARE = 0.85  # a generator process that used more of its core than this may itself be the limit


def percentile_key(percentile: float) -> str:
    """``50.0`` -> ``"p50"``, ``99.9`` -> ``"p99.9"``."""
    return f"p{percentile:g}"


def machine() -> JsonObject:
    """Processor, cores this run may use, system and library versions."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def summarise(recording: Recording, settings: JsonObject, *, started_at: str) -> JsonObject:
    """Everything about a run, ready for JSON. Latencies in ms, rates per second, sizes in bytes.

    Args:
        recording: of the whole run, closed.
        settings: what was asked for, as given on the command line; ``processes`` and ``is_image`` are read.
        started_at: ISO 8601 time of day.
    """
    window = recording.window_s
    rate = recording.ok_in_window / window if window > 0 else 0.0
    rates = {"requests_per_s": rate, "received_bytes_per_s": recording.received_in_window / window if window else 0.0}
    if settings.get("is_image"):
        rates["images_per_s"] = rate
    counted = recording.ok + recording.failures
    counts = recording.counts()
    hdr = encoded(counts)
    return {
        "schema": SCHEMA,
        "started_at": started_at,
        "settings": settings,
        "machine": machine(),
        "window_s": window,
        "is_interrupted": recording.interrupted,
        "requests": {
            "counted": counted,
            "ok": recording.ok,
            "failed": recording.failures,
            "unsent": recording.unsent,
            "unfinished": recording.unfinished,
            "failed_share": recording.failures / counted if counted else 0.0,
        },
        "rates": rates,
        "bytes": {"sent": recording.sent_size, "received": recording.received_size},
        "statuses": {str(status): count for status, count in sorted(recording.statuses.items())},
        "errors": dict(sorted(recording.errors.items())),
        "error_samples": recording.samples,
        "latency_ms": _latency(recording, counts),
        "send_lag_ms": {
            **{percentile_key(p): value_at(recording.lag_counts, p) / 1000 for p in (50.0, 99.0)},
            "max": recording.lag_max_us / 1000,
        },
        "generator_cpu_share": recording.cpu_share / max(1, settings.get("processes", 1)),
        "histogram": {
            "unit": "us",
            **({"hdr_v2": hdr} if hdr else {}),
            "counts": [[bucket_value(index), count] for index, count in sorted(counts.items())],
        },
        "series": _series(recording),
    }


def _latency(recording: Recording, counts: dict[int, int]) -> JsonObject:
    ok = sum(counts.values())
    if not ok:
        return {}
    # A bucket's upper end may lie above the largest value seen.
    latency = {percentile_key(p): min(highest_at(counts, p), recording.latency_max_us) / 1000 for p in PERCENTILES}
    latency["max"] = recording.latency_max_us / 1000
    latency["min"] = recording.latency_min_us / 1000
    latency["mean"] = recording.latency_sum_us / ok / 1000
    latency["stddev"] = standard_deviation(counts) / 1000
    return latency


def _series(recording: Recording) -> list[JsonObject]:
    series = []
    for second in recording.seconds:
        counts = dict(zip(second.counts[::2], second.counts[1::2], strict=True))
        row: JsonObject = {
            "second": second.number,
            "ok": second.ok,
            "failed": second.failed,
            "received": second.received_size,
        }
        if counts:
            row |= {percentile_key(p): value_at(counts, p) / 1000 for p in (50.0, 99.0)}
            row["max"] = bucket_value(max(counts)) / 1000
        series.append(row)
    return series


def warnings(report: JsonObject) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = []
    requests, settings = report["requests"], report["settings"]
    if report["is_interrupted"]:
        found.append(f"interrupted: {requests['unfinished']} requests were still under way")
    if requests["failed"]:
        others = "; the latencies are those of the others" if requests["ok"] else ""
        found.append(f"{requests['failed_share']:.1%} of the requests failed{others}")
    if requests["unsent"]:
        found.append(
            f"{requests['unsent']} requests could not be sent within --timeout {settings['timeout_s']:g} s with "
            f"--in-flight-max {settings['in_flight_max']}; the true latencies are longer than shown"
        )
    if report["generator_cpu_share"] > BUSY_SHARE:
        found.append(
            f"the generator used {report['generator_cpu_share']:.0%} of a core: it may be the limit; "
            "try --processes 2 or another machine"
        )
    if settings.get("rate") and report["window_s"] > 0:
        share = report["rates"]["requests_per_s"] / settings["rate"]
        if share < 0.95 and not report["is_interrupted"]:
            found.append(f"the server kept up with {share:.0%} of the asked rate")
    return found


def rows(report: JsonObject) -> list[tuple[str, str, bool]]:
    """Label, value and whether it is bad news, in reading order."""
    requests, rates, latency = report["requests"], report["rates"], report["latency_ms"]
    shown = [
        ("window", f"{report['window_s']:.1f} s", False),
        ("requests", f"{requests['counted']}", False),
        ("ok", f"{requests['ok']}", False),
        ("not 200 or no answer", f"{requests['failed']}  ({requests['failed_share']:.1%})", requests["failed"] > 0),
    ]
    shown += [
        (f"  status {status}", str(count), not status.startswith("2")) for status, count in report["statuses"].items()
    ]
    shown += [(f"  {kind}", str(count), True) for kind, count in report["errors"].items()]
    if requests["unsent"]:
        shown.append(("unsent", str(requests["unsent"]), True))
    label = "images/s" if "images_per_s" in rates else "requests/s"
    shown.append((label, f"{rates['requests_per_s']:.2f}", False))
    shown.append(("received", f"{rates['received_bytes_per_s'] / 1e6:.3f} MB/s", False))
    shown += [(f"latency {name}", f"{value:.3f} ms", False) for name, value in latency.items()]
    if report["settings"].get("rate"):
        lag = report["send_lag_ms"]
        shown.append(("sent late by", f"p50 {lag['p50']:.3f}  p99 {lag['p99']:.3f}  max {lag['max']:.3f} ms", False))
    shown.append(("generator", f"{report['generator_cpu_share']:.0%} of a core{_limit(report)}", False))
    return shown


def _limit(report: JsonObject) -> str:
    """How many requests the generator itself could send, by what one cost it."""
    processes, share = report["settings"]["processes"], report["generator_cpu_share"]
    if share <= 0 or not report["rates"]["requests_per_s"]:
        return ""
    most = report["rates"]["requests_per_s"] / share
    each = f" in each of {processes} processes" if processes > 1 else ""
    return f"{each}; it could send about {most:,.0f} such requests/s at most"
