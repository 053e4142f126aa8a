"""The last thing that is shown: the aims beside what was measured, then the figures; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.gpu_steps.settings import Row

SIZE_MAX = 12_000  # characters of the whole table
ROOM_FOR_LAST_LINE = 120
ALONE_SLACK_MS = 0.15


@dataclass(frozen=True, slots=True)
class Aim:
    """What should be reached, and what was: ``measured`` is ``None`` where a figure is missing.

    ``is_size``: depends on the sizes; tiny ones say nothing about it.
    """

    what: str
    bound: str
    measured: float | None
    is_reached: bool | None
    is_size: bool = True

    def row(self, *, is_tiny: bool = False) -> dict[str, Any]:
        verdict = "open" if self.is_reached is None else "reached" if self.is_reached else "missed"
        if is_tiny and self.is_size and self.is_reached is not None:
            verdict = "not judged"
        return {"aim": self.what, "bound": self.bound, "measured": self.measured, "verdict": verdict}


def at_least(what: str, bound: float, measured: float | None) -> Aim:
    return Aim(what, f">= {bound:g}", measured, None if measured is None else measured >= bound)


def at_most(what: str, bound: float, measured: float | None, *, is_size: bool = True) -> Aim:
    return Aim(what, f"<= {bound:g}", measured, None if measured is None else measured <= bound, is_size)


def ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or not under else over / under


def rate_of(row: Row | None) -> float | None:
    if row is None or "failed" in row:
        return None
    return float(row["items_per_s"]["median"])


def found(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """The first row with these values."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def work_out(rows: Mapping[str, list[Row]]) -> list[Aim]:
    """Every aim for every network and precision that the engine was measured with."""
    engine, direct = rows.get("engine", []), rows.get("direct", [])
    kinds = list(dict.fromkeys((r["network"], r["precision"]) for r in engine if "clients" in r))
    aims = [aim for kind in kinds for aim in _aims_of(*kind, engine, direct, rows.get("memory", []))]
    trace = rows.get("trace", [])
    gaps = [float(row["gap_share"]) for row in trace if row.get("gap_share") is not None]
    aims.append(at_most("idle gaps of the device under load", 0.05, max(gaps) if gaps else None))
    differences = [r["error"] / r["allowed"] for r in [*engine, *direct] if r.get("allowed") and "error" in r]
    aims.append(
        at_most(
            "answers: error of that of the precision", 1.0, max(differences) if differences else None, is_size=False
        )
    )
    over_http = found(rows.get("over_http", []), model="resnet50_uint8", clients=256)
    alone = found(engine, network="resnet50_uint8", workers=1, batch=32, clients=128)
    served = None if over_http is None or "failed" in over_http else float(over_http["items_per_s"])
    aims.append(at_least("HTTP, raw uint8, 256 clients: of the engine alone", 0.9, ratio(served, rate_of(alone))))
    pageable = [
        float(row["counted"]["pageable_copies"]) for row in engine if "pageable_copies" in row.get("counted", {})
    ]
    aims.append(at_most("batches copied from pageable memory", 0, sum(pageable) if pageable else None, is_size=False))
    failed = sum("failed" in row for name in ("engine", "direct") for row in rows.get(name, []))
    aims.append(at_most("rows that failed", 0, float(failed) if engine or direct else None, is_size=False))
    return aims


def _aims_of(network: str, precision: str, engine: list[Row], direct: list[Row], memory: list[Row]) -> list[Aim]:
    kind = {"network": network, "precision": precision}
    mine = [row for row in engine if row.get("clients") and row["network"] == network and row["precision"] == precision]
    batches = sorted({row["batch"] for row in mine})
    name = f"{network} {precision}"
    aims = []
    for batch in [b for b in batches if b > 1 and b != 8]:
        anchor = max((row["items_per_s"]["median"] for row in _anchors(engine, direct, kind, batch)), default=None)
        for times, bound in ((4, 0.95), (2, 0.90)):
            got = rate_of(found(mine, workers=1, batch=batch, clients=times * batch))
            aims.append(at_least(f"{name}, batch {batch}, {times} x in flight: of direct", bound, ratio(got, anchor)))
        one = found(mine, workers=1, batch=batch, clients=4 * batch)
        two = found(mine, workers=2, batch=batch, clients=4 * batch)
        aims.append(_not_slower(f"{name}, batch {batch}: 2 workers of 1", two, one))
        held = found(memory, **kind, batch=batch)
        loop = found(direct, **kind, way="graph", batch=batch)
        aims.append(at_most(f"{name}, batch {batch}: memory of direct", 1.1, ratio(_peak(held), _peak(loop))))
    alone = found(mine, workers=1, batch=1, clients=1)
    loops = [row["alone_ms"] for row in _anchors(engine, direct, kind, 1)]
    above = None if alone is None or not loops else round(alone["p50_ms"] - min(loops), 4)
    aims.append(at_most(f"{name}, 1 client: p50 above direct, ms", ALONE_SLACK_MS, above))
    return aims


def _anchors(engine: list[Row], direct: list[Row], kind: Row, batch: int) -> list[Row]:
    """The direct graph loop in the engine's own process, before and after it, and alone: the best of them counts.

    Alone it runs with TorchScript's fusions on, beside the engine as the engine has set TorchScript for its process.
    """
    rows = [row for row in engine if row.get("anchor") == "graph"] + [
        row for row in direct if row.get("way") == "graph"
    ]
    wanted = {**kind, "batch": batch}
    return [row for row in rows if wanted.items() <= row.items() and "failed" not in row]


def _not_slower(what: str, row: Row | None, other: Row | None) -> Aim:
    """Ranges that overlap are no difference."""
    got = ratio(rate_of(row), rate_of(other))
    reached = None
    if got is not None and row is not None and other is not None:
        reached = got >= 1 or row["items_per_s"]["high"] >= other["items_per_s"]["low"]
    return Aim(what, ">= 1, or ranges overlap", got, reached)


def _peak(row: Row | None) -> float | None:
    return None if row is None else row.get("memory", {}).get("reserved_peak")


def table(steps: list[dict[str, Any]], rows: Mapping[str, list[Row]], *, is_tiny: bool) -> tuple[str, list[Row]]:
    """(at most ``SIZE_MAX`` characters, the aims as rows). What is cut off is at the end, and said."""
    aims = work_out(rows)
    lines = ["", "| step | status | s | |", "|---|---|---|---|"]
    lines += [f"| {s['step']} | {s['status']} | {s['seconds']} | {_cell(s['note'], 160)} |" for s in steps]
    if is_tiny:
        lines += ["", "Tiny sizes: that it runs is shown, its figures mean nothing."]
    lines += ["", "| aim | bound | measured | |", "|---|---|---|---|"]
    for aim in aims:
        row = aim.row(is_tiny=is_tiny)
        shown = "" if aim.measured is None else f"{aim.measured:.3f}"
        lines.append(f"| {row['aim']} | {row['bound']} | {shown} | {row['verdict']} |")
    for name in ("engine", "direct", "trace", "over_http", "memory", "faults", "stalls", "copies", "jpeg", "sanitizer",
                 "engine_tests", "build", "env"):  # fmt: skip
        if rows.get(name):
            lines += ["", f"{name}:", *map(_shown, rows[name])]
    return _cut(lines), [aim.row(is_tiny=is_tiny) for aim in aims]


def _cut(lines: list[str]) -> str:
    size = 0
    for number, line in enumerate(lines):
        size += len(line) + 1
        if size > SIZE_MAX - ROOM_FOR_LAST_LINE:
            return "\n".join([*lines[:number], f"({len(lines) - number} more lines: summary.json has all)", ""])
    return "\n".join([*lines, ""])


def _shown(row: Row) -> str:
    """One row in one short line."""
    parts = []
    for key, value in row.items():
        if isinstance(value, Mapping) and value.keys() == {"median", "low", "high"}:
            parts.append(f"{key}={value['median']:g} ({value['low']:g} to {value['high']:g})")
        elif isinstance(value, float):
            parts.append(f"{key}={value:.4g}")
        elif isinstance(value, Mapping):
            parts.append(f"{key}={{{', '.join(f'{k}: {v}' for k, v in value.items())}}}")
        else:
            parts.append(f"{key}={value}")
    return "- " + _cell(" ".join(parts), 240)


def _cell(text: str, size_max: int) -> str:
    return " ".join(str(text).split()).replace("|", "/")[:size_max]
