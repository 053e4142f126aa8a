"""What a comparison came to: tables with medians and spreads, the aims beside what was reached, a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.direct_sides import CALLED
from bench.workloads import BODIES, HEADS

# What the labels of peers begin with.
PEER_LABELS = ("mosec", "LitServe", "TorchServe", "PyTriton", "Ray Serve", "BentoML", "MLServer")

# workload -> side -> clients -> "rate", "p50_ms" ... -> one number per round
Results = dict[str, dict[str, dict[str, dict[str, list[float]]]]]


def median(results: Results, workload: str, side: str, clients: str, key: str = "rate") -> float:
    """KeyError if it was not measured."""
    return statistics.median(results[workload][side][clients][key])


def best(results: Results, workload: str, prefix: str, clients: str) -> float:
    """The highest median rate of the sides whose label begins with ``prefix`` and ends with its workers."""
    rates = [
        median(results, workload, side, clients)
        for side in results[workload]
        if side.rpartition(", ")[0] == prefix and clients in results[workload][side]
    ]
    if not rates:
        raise KeyError(prefix)
    return max(rates)


def best_peer(results: Results, workload: str, clients: str) -> float:
    """The highest median rate of all peers that were measured; KeyError if there was none."""
    found = []
    for peer in PEER_LABELS:
        try:
            found.append(best(results, workload, peer, clients))
        except KeyError:
            continue
    if not found:
        raise KeyError("peers")
    return max(found)


def best_direct(results: Results, workload: str, clients: str, precision: str = "fp32") -> float:
    """The highest median rate of the engines that were called directly in a precision; KeyError without any."""
    end = CALLED if precision == "fp32" else f"{CALLED}, {precision}"
    rates = [median(results, workload, side, clients) for side in results[workload] if side.endswith(end)]
    if not rates:
        raise KeyError(end)
    return max(rates)


def memory_ratio(results: Results) -> float:
    """With four workers by with one, of the backend for which it is the highest."""
    rows = results["memory"]
    used = {side: median(results, "memory", side, "", "mb") for side in rows}
    backends = [side.removesuffix(", 4 workers") for side in rows if side.endswith(", 4 workers")]
    return max(used[f"{each}, 4 workers"] / used[f"{each}, 1 worker"] for each in backends)


def share_of_alone(mix: dict[str, dict[str, dict[str, list[float]]]]) -> float:
    """The sum, over the models of a mix, of what each does beside the others as a share of what it does alone."""
    total = 0.0
    for side, rows in mix.items():
        if side.endswith(", at once"):
            (clients,) = rows
            alone = mix[side.replace(", at once", ", alone")][clients]
            total += statistics.median(rows[clients]["rate"]) / statistics.median(alone["rate"])
    return total


Aim = tuple[str, float, Callable[[Results], float]]

# (what, at least, how it is worked out); a latency is written as limit / measured, so that 1 is enough.
AIMS: list[Aim] = [
    ("nothing, raw, 64 clients: of mosec", 1.5,
     lambda r: best(r, "nothing", "pyserve", "64") / best(r, "nothing", "mosec", "64")),
    ("nothing, raw, 64 clients: of TorchServe, batching on", 40,
     lambda r: best(r, "nothing", "pyserve", "64") / best(r, "nothing", "TorchServe", "64")),
    ("nothing, raw, 64 clients: of TorchServe, batch size 1", 40,
     lambda r: best(r, "nothing", "pyserve", "64") / best(r, "nothing", "TorchServe, batch size 1", "64")),
    ("nothing, raw, 64 clients: of the bare echo", 0.50,
     lambda r: best(r, "nothing", "pyserve", "64") / median(r, "nothing", "bare echo", "64")),
    *[
        (f"nothing, raw, {variant}, 64 clients: of the same with one head", 0.85,
         lambda r, variant=variant:
         best(r, "nothing", f"pyserve, {variant}", "64") / best(r, "nothing", "pyserve", "64"))
        for variant in (HEADS, BODIES)
    ],
    ("nothing, JSON, 64 clients: of the bare echo", 0.25,
     lambda r: best(r, "nothing", "pyserve, JSON", "64") / median(r, "nothing", "bare echo", "64")),
    ("nothing, raw, 1 client: 2 x p50 of the bare echo / p50", 1.0,
     lambda r: 2 * median(r, "nothing", "bare echo", "1", "p50_ms")
     / median(r, "nothing", "pyserve, 1 worker", "1", "p50_ms")),
    ("resnet18, fp32: of the best peer", 1.15,
     lambda r: best(r, "resnet18", "pyserve", "8") / best_peer(r, "resnet18", "8")),
    ("resnet18, bf16: of our fp32", 1.7,
     lambda r: best(r, "resnet18", "pyserve, bf16", "8") / best(r, "resnet18", "pyserve", "8")),
    ("resnet18, bf16: test pictures with the same class", 1.0,
     lambda r: median(r, "resnet18, classes", "bf16 as fp32", "", "share")),
    ("densenet161, bf16: test pictures with the same class", 1.0,
     lambda r: median(r, "densenet161, classes", "bf16 as fp32", "", "share")),
    ("densenet161, fp32: of the best peer", 1.3,
     lambda r: best(r, "densenet161", "pyserve", "8") / best_peer(r, "densenet161", "8")),
    ("densenet161, bf16: of our fp32", 1.7,
     lambda r: best(r, "densenet161", "pyserve, bf16", "8") / best(r, "densenet161", "pyserve", "8")),
    *[
        (f"{name}, {precision}: of the best engine called directly", 0.97,
         lambda r, name=name, precision=precision, label=label:
         best(r, name, label, "8") / best_direct(r, name, "8", precision))
        for name in ("resnet18", "densenet161") for precision, label in (("fp32", "pyserve"), ("bf16", "pyserve, bf16"))
    ],
    *[
        (f"{name}, fp32: of TorchScript, as it was served before", 1.2,
         lambda r, name=name: best(r, name, "pyserve", "8") / best(r, name, "pyserve, torchscript", "8"))
        for name in ("resnet18", "densenet161")
    ],
    ("resnet18, int8: of our fp32", 1.5,
     lambda r: best(r, "resnet18", "pyserve, int8", "8") / best(r, "resnet18", "pyserve", "8")),
    ("resnet18, int8: test pictures with the same class", 0.99,
     lambda r: median(r, "resnet18, classes", "int8 as fp32", "", "share")),
    ("bert: of the best engine called directly", 0.97,
     lambda r: max(best(r, "bert", label, "8") for label in ("pyserve", "pyserve, padded"))
     / best_direct(r, "bert", "8")),
    ("memory: 1.15 / (4 workers by 1 worker), of the worst backend", 1.0, lambda r: 1.15 / memory_ratio(r)),
    ("first start of an eager densenet161: 8 s / first 200", 1.0,
     lambda r: 8 / median(r, "first_start", "first 200", "", "s")),
    ("first start: share of requests answered while the backend is made and exchanged", 1.0,
     lambda r: median(r, "first_start", "until it was exchanged", "", "share")),
    ("encoder, grouped by padded length: of one padded length for all", 1.5,
     lambda r: best(r, "encoder", "pyserve", "64") / best(r, "encoder", "pyserve, one length", "64")),
    ("handler, 64 clients: of TorchServe, batch size 1", 8,
     lambda r: best(r, "handler", "pyserve, batch size 1", "64")
     / best(r, "handler", "TorchServe, batch size 1", "64")),
    ("handler, 1 client: p50 of TorchServe / 3 / p50 of pyserve", 1.0,
     lambda r: median(r, "handler", "TorchServe, batch size 1, 1 worker", "1", "p50_ms") / 3
     / median(r, "handler", "pyserve, batch size 1, 1 worker", "1", "p50_ms")),
    ("megabyte, v2 binary, 8 clients: of three copies in memory", 0.5,
     lambda r: best(r, "megabyte", "pyserve, v2 binary", "8") / median(r, "megabyte", "three copies in memory", "1")),
    ("megabyte, v2 binary, 8 clients: of the same bytes over bare sockets", 0.5,
     lambda r: best(r, "megabyte", "pyserve, v2 binary", "8")
     / median(r, "megabyte", "the same bytes over bare sockets", "8")),
    ("megabyte, v2 binary, 8 clients: of the bare echo", 0.5,
     lambda r: best(r, "megabyte", "pyserve, v2 binary", "8") / median(r, "megabyte", "bare echo", "8")),
    ("mix of three models: sum of each one's share of what it does alone", 0.9,
     lambda r: share_of_alone(r["mix"])),
    ("resnet18, open loop at 80 %: 3 x p50 / p99", 1.0,
     lambda r: 3 * median(r, "resnet18, open loop", "80% of the peak", "open", "p50_ms")
     / median(r, "resnet18, open loop", "80% of the peak", "open", "p99_ms")),
]  # fmt: skip


# What may be measured of a side, and the heading above it.
COLUMNS = {
    "rate": "requests/s", "p50_ms": "p50 ms", "p99_ms": "p99 ms", "p99.9_ms": "p99.9 ms", "mb": "MB", "s": "s",
    "share": "share", "failed": "not 200",
}  # fmt: skip


def print_tables(told: dict[str, Any], results: Results) -> None:
    """Markdown."""
    cpu, versions = told["machine"]["cpu"], told["machine"]["versions"]
    print(
        f"\n{cpu}, {told['machine']['cores']} cores, load before {told['load_average_before'][0]:.1f}; "
        f"{told['rounds']} rounds of {told['duration_s']:g} s; load by {told.get('generator', 'latency.py')}; "
        f"{versions}; peers: {told['peers']}"
    )
    for what, backend in told.get("chosen", {}).items():
        print(f"- {what}: {backend}")
    for workload, sides in results.items():
        measured = [key for key in COLUMNS if any(key in row for rows in sides.values() for row in rows.values())]
        print(
            f"\n### {workload}\n\nMedians, lowest and highest in brackets.\n\n"
            f"| | clients | {' | '.join(COLUMNS[key] for key in measured)} |\n|---|---|{'---|' * len(measured)}"
        )
        for side, rows in sides.items():
            for clients, row in rows.items():
                cells = [
                    f"{sum(row.get(key, [])):g}" if key == "failed" else _spread(row.get(key, [])) for key in measured
                ]
                print(f"| {side} | {clients} | {' | '.join(cells)} |")
    print("\n### Aims\n\n| | at least | measured | |\n|---|---|---|---|")
    for what, least, work_out in AIMS:
        try:
            ratio = work_out(results)
        except KeyError:
            continue  # not part of this run
        print(f"| {what} | {least:g} | {ratio:.2f} | {'reached' if ratio >= least else 'missed'} |")


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    digits = 0 if statistics.median(values) >= 1000 else 2 if statistics.median(values) >= 1 else 3
    middle, low, high = (f"{each:.{digits}f}" for each in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def first_rows(sides: dict[str, dict[str, dict[str, list[float]]]]) -> list[dict[str, list[float]]]:
    """What was measured of each side with its first number of clients."""
    return [next(iter(rows.values())) for rows in sides.values()]


def save_plot(results: Results, path: Path) -> None:
    """A bar per side and number of clients, one panel per workload; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loads = [name for name, sides in results.items() if any("rate" in row for row in first_rows(sides))]
    loads = [name for name in loads if "open loop" not in name]
    figure, axes = pyplot.subplots(len(loads), 1, figsize=(9, 1 + 3.2 * len(loads)), squeeze=False)
    for name, axis in zip(loads, axes[:, 0], strict=True):
        labels, heights = [], []
        for side, rows in results[name].items():
            for clients, row in rows.items():
                if "rate" not in row:
                    continue
                labels.append(f"{side} ({clients})")
                heights.append(statistics.median(row["rate"]))
        colors = ["tab:blue" if label.startswith("pyserve") else "tab:gray" for label in labels]
        axis.barh(labels, heights, color=colors)
        axis.invert_yaxis()
        axis.tick_params(labelsize=6)
        axis.set_title(f"{name}: requests/s (clients)", fontsize=9)
        if heights and max(heights) > 50 * min(heights):
            axis.set_xscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
