"""What a comparison came to: tables with medians and spreads, the aims beside what was reached, a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    ("nothing, raw, 64 clients: of the bare echo", 0.40,
     lambda r: best(r, "nothing", "pyserve", "64") / median(r, "nothing", "bare echo", "64")),
    ("nothing, raw, 1 client: 0.25 ms / p50", 1.0,
     lambda r: 0.25 / median(r, "nothing", "pyserve, 1 worker", "1", "p50_ms")),
    ("resnet18, fp32: of the direct call", 0.95,
     lambda r: best(r, "resnet18", "pyserve", "8") / median(r, "resnet18", "called directly", "8")),
    ("resnet18, fp32: of the best peer", 1.15,
     lambda r: best(r, "resnet18", "pyserve", "8") / best_peer(r, "resnet18", "8")),
    ("resnet18, bf16: of our fp32", 1.7,
     lambda r: best(r, "resnet18", "pyserve, bf16", "8") / best(r, "resnet18", "pyserve", "8")),
    ("resnet18, bf16: test pictures with the same class", 1.0,
     lambda r: median(r, "resnet18, classes", "bf16 as fp32", "")),
    ("densenet161, bf16: test pictures with the same class", 1.0,
     lambda r: median(r, "densenet161, classes", "bf16 as fp32", "")),
    ("densenet161, fp32: of the direct call", 0.95,
     lambda r: best(r, "densenet161", "pyserve", "8") / median(r, "densenet161", "called directly", "8")),
    ("densenet161, fp32: of the best peer", 1.3,
     lambda r: best(r, "densenet161", "pyserve", "8") / best_peer(r, "densenet161", "8")),
    ("densenet161, bf16: of our fp32", 1.7,
     lambda r: best(r, "densenet161", "pyserve, bf16", "8") / best(r, "densenet161", "pyserve", "8")),
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


def print_tables(told: dict[str, Any], results: Results) -> None:
    """Markdown."""
    cpu, versions = told["machine"]["cpu"], told["machine"]["versions"]
    print(
        f"\n{cpu}, {told['machine']['cores']} cores, load before {told['load_average_before'][0]:.1f}; "
        f"{told['rounds']} rounds of {told['duration_s']:g} s; {versions}; peers: {told['peers']}"
    )
    for workload, sides in results.items():
        print(
            f"\n### {workload}\n\nMedians, lowest and highest in brackets.\n\n"
            "| | clients | requests/s | p50 ms | p99 ms | not 200 |\n|---|---|---|---|---|---|"
        )
        for side, rows in sides.items():
            for clients, row in rows.items():
                print(
                    f"| {side} | {clients} | {_spread(row['rate'])} | {_spread(row.get('p50_ms', []))} | "
                    f"{_spread(row.get('p99_ms', []))} | {sum(row.get('failed', [])):g} |"
                )
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


def save_plot(results: Results, path: Path) -> None:
    """A bar per side and number of clients, one panel per workload; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loads = [name for name in results if "open loop" not in name and "classes" not in name]
    figure, axes = pyplot.subplots(len(loads), 1, figsize=(9, 1 + 3.2 * len(loads)), squeeze=False)
    for name, axis in zip(loads, axes[:, 0], strict=True):
        labels, heights = [], []
        for side, rows in results[name].items():
            for clients, row in rows.items():
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
