"""Serves the zoo in every variant and writes docs/correctness.md: how far each answer is from plain torch's.

    make correctness                                    all of it
    python -m tests.zoo.correctness --part architectures --minutes 20

Ends with status 1 if an answer was wrong. What was not reached in the time is left out, and counted.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import wait
from pathlib import Path

import torch

from . import architectures, matrix
from .case import Variant
from .catalogue import CASES, KINDS
from .matrix import Pair
from .trial import Outcome

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "correctness.md"
PARTS = ("small models", "architectures")
TEXT_SIZE_MAX = 160  # of a refusal, in the table

INTRODUCTION = """\
# Correctness

How far served answers are from what plain torch computes: the class built again, its weights loaded with
`load_state_dict`, `eval()`, `no_grad()`, each item alone. Written by `make correctness`; the models are those of
[tests/zoo](../tests/zoo). Each is asked raw and in JSON, one request after the other and in mixed batches of up
to 8 from 12 clients, with one worker and then with two.

A difference is relative to the largest magnitude of the right answer's tensor; whole numbers, names, structure, NaN and
infinities must be equal. Bounds: 1e-4 for float32, 1e-9 for float64, 5 % for `precision: bf16`. "alone" in the column
batch means that no batch formed: the server found that answers depend on it, or the model was registered so.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.zoo.correctness", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, help="only this one; the other's table stays as it is")
    parser.add_argument("--minutes", type=float, default=12, help="for each part; what is not reached is left out")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    is_right = True
    for part in [options.part] if options.part else PARTS:
        absent = architectures.missing() if part == "architectures" else []
        if absent:
            print(f"{part}: not installed: {', '.join(absent)}")
            continue
        pairs = _pairs(part)
        outcomes = _run(pairs, options.minutes * 60)
        _write(part, _section(part, outcomes, len(pairs)))
        is_right = is_right and not any(outcome.wrong for outcome in outcomes)
    return 0 if is_right else 1


def _pairs(part: str) -> list[Pair]:
    """In the order of their worth, should the time not suffice: one of each case, then the other variants."""
    if part == "architectures":
        return matrix.of_architectures()
    first = matrix.in_each_run()
    names = {case.name for case, _ in first}
    first += [(case, Variant()) for case in CASES if case.name not in names]
    return first + [pair for pair in matrix.at_night() if pair not in first]


def _run(pairs: Sequence[Pair], limit_s: float) -> list[Outcome]:
    begun = time.monotonic()

    def progress(outcome: Outcome) -> None:
        found = f"{len(outcome.wrong)} WRONG" if outcome.wrong else "refused" if outcome.refusal else "right"
        print(f"{time.monotonic() - begun:6.0f} s  {outcome.case.name} {outcome.variant}: {found}", flush=True)
        for line in outcome.wrong[:1]:
            print(f"          {line[:300]}", flush=True)

    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        compiled = ROOT / ".pytest_cache" / "d" / "zoo-packages"  # where the tests keep them
        with matrix.running(Path(folder), compiled) as run:
            futures = run.begin(pairs, progress)
            wait(futures, timeout=limit_s - (time.monotonic() - begun))
            reached = [future for future in futures if not future.cancel()]
            outcomes = [future.result() for future in reached]
    return outcomes


def _section(part: str, outcomes: list[Outcome], planned: int) -> str:
    lines = [f"## {part.capitalize()}", "", *_summary(outcomes, planned), ""]
    kinds = KINDS if part == "small models" else {"": architectures.CASES}
    for kind, cases in kinds.items():
        lines += [f"### {kind.capitalize()}", ""] if kind else []
        lines += ["| model | the trap | served as | lane | batch | answers | largest difference, or the error |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        names = {case.name: number for number, case in enumerate(cases)}
        mine = [outcome for outcome in outcomes if outcome.case.name in names]
        mine.sort(key=lambda each: (names[each.case.name], str(each.variant)))
        lines += map(_row, mine)
        lines.append("")
    return "\n".join(lines)


def _summary(outcomes: list[Outcome], planned: int) -> list[str]:
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    answers = sum(outcome.answered for outcome in outcomes)

    def largest(precision: str) -> str:
        return f"{max((each.largest for each in outcomes if each.variant.precision == precision), default=0.0):.1e}"

    where = f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores"
    lines = [
        f"{len({outcome.case.name for outcome in outcomes})} models, {len(outcomes)} of {planned} variants, "
        f"{answers:,} right answers, {sum(len(outcome.wrong) for outcome in wrong)} wrong ones "
        f"({time.strftime('%Y-%m-%d')}, {where}).",
        "",
        f"Largest difference: fp32 {largest('fp32')}, bf16 {largest('bf16')}. "
        f"Refused at registration: {sum(bool(outcome.refusal) for outcome in outcomes)} variants.",
    ]
    if wrong:
        lines += ["", "Wrong:", "", *(f"- {each.case.name}, {each.variant}: {_cell(each.wrong[0])}" for each in wrong)]
    return lines


def _row(outcome: Outcome) -> str:
    lane = outcome.lane + (f", {outcome.conversion}" if outcome.conversion else "")
    alone = "alone: " + _cell(outcome.note) if outcome.note else "alone"
    batch = "" if not outcome.lane else alone if outcome.batch <= 1 else str(outcome.batch)
    if outcome.wrong:
        found = f"**{len(outcome.wrong)} wrong**: {_cell(outcome.wrong[0])}"
    elif outcome.refusal:
        found = f"refused: {_cell(_told(outcome.refusal))}"
    elif not outcome.answered:
        found = f"errors only: {_cell(outcome.errors[0])}" if outcome.errors else "errors, as the class itself raises"
    else:
        found = "a draw of its own each" if outcome.case.likely else f"{outcome.largest:.1e}"
        found += f"; {len(outcome.errors)} errors: {_cell(outcome.errors[0])}" if outcome.errors else ""
    cells = [outcome.case.name, outcome.case.trap, str(outcome.variant), lane, batch, str(outcome.answered), found]
    return f"| {' | '.join(cells)} |"


def _told(refusal: str) -> str:
    """The text behind the words that all refusals begin with."""
    return re.sub(r"^Failed to start workers for model \S+ version: \S+ ", "", refusal)


def _cell(text: str) -> str:
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= TEXT_SIZE_MAX else f"{text[:TEXT_SIZE_MAX]}..."


def _write(part: str, section: str) -> None:
    """Replaces the part's section of the document, or appends it."""
    TABLE.parent.mkdir(exist_ok=True)
    old = TABLE.read_text() if TABLE.exists() else ""
    sections = {text.partition("\n")[0].lower(): f"## {text}" for text in old.split("\n## ")[1:]}
    sections[part] = section
    kept = [sections[name].strip() for name in PARTS if name in sections]
    TABLE.write_text("\n\n".join([INTRODUCTION.strip(), *kept]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
