"""Results of the load test side by side, and as a picture."""

from __future__ import annotations

from pathlib import Path

from pyserve.load_test.report import JsonObject


def print_comparison(first: JsonObject, second: JsonObject, names: tuple[str, str]) -> None:
    """Rates and percentiles of two reports with the ratio second / first."""
    pairs = [(key, first["rates"][key], second["rates"].get(key)) for key in first["rates"]]
    pairs += [(f"latency {key} ms", value, second["latency_ms"].get(key)) for key, value in first["latency_ms"].items()]
    pairs.append(("failed", first["requests"]["failed"], second["requests"]["failed"]))
    print(f"{'':<24}{'A':>14}{'B':>14}{'B / A':>9}      A = {names[0]}, B = {names[1]}")
    for label, a, b in pairs:
        ratio = f"{b / a:.3f}" if b is not None and a else "-"
        print(f"{label:<24}{a:>14.3f}{'-' if b is None else format(b, '.3f'):>14}{ratio:>9}")


def plot(report: JsonObject, path: Path, title: str) -> None:
    """Latency by percentile (each further nine takes equal width) and throughput over time, as an image.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = report["histogram"]["counts"]
    total = sum(count for _, count in counts)
    below, xs, ys = 0, [], []
    for value, count in counts:
        below += count
        xs.append(1 / max(1 - below / total, 0.5 / total))
        ys.append(value / 1000)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    left.step(xs, ys, where="pre")
    left.set_xscale("log")
    ticks = [p for p in (0.0, 50.0, 90.0, 99.0, 99.9, 99.99) if not xs or 1 / (1 - p / 100) <= max(xs)]
    left.set_xticks([1 / (1 - p / 100) for p in ticks], [f"{p:g}%" for p in ticks])
    left.minorticks_off()
    left.set(xlabel="percentile", ylabel="latency, ms", ylim=(0, None), title="latency by percentile")
    # Whole seconds of the window only: a partial last one would look like a drop.
    by_second = {row["second"]: row for row in report["series"]}
    seconds = range(max(1, int(report["window_s"])))
    for name, color in (("ok", None), ("failed", "red")):
        if name == "ok" or report["requests"]["failed"]:
            values = [by_second.get(second, {}).get(name, 0) for second in seconds]
            right.plot(seconds, values, color=color, label=name, marker="o" if len(values) < 3 else None)
    if report["requests"]["failed"]:
        right.legend()
    right.set(xlabel="second", ylabel="answers per second", ylim=(0, None), title="throughput")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
