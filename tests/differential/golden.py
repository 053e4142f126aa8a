"""What TorchServe was observed to answer, as JSON files: one for each file of cases."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden/torchserve/calls"


def path_of(case_name: str) -> Path:
    return GOLDEN / (case_name.partition("/")[0] + ".json")


def read(case_name: str) -> list[dict[str, Any]] | None:
    """What was recorded of a case; None if nothing was."""
    path = path_of(case_name)
    if not path.exists():
        return None
    recorded: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
    return recorded.get(case_name)


def names(path: Path) -> set[str]:
    """Of the cases in one file of recorded answers."""
    return set(json.loads(path.read_text()))


def write(seen: dict[str, list[dict[str, Any]]], all_names: set[str]) -> None:
    """Lays ``seen``, by name of the case, over what is recorded; forgets cases that are no more."""
    by_path: dict[Path, dict[str, Any]] = {}
    for name, answers in seen.items():
        by_path.setdefault(path_of(name), {})[name] = answers
    GOLDEN.mkdir(parents=True, exist_ok=True)
    lock = os.open(GOLDEN, os.O_RDONLY)  # two recordings may run side by side
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path, answers in by_path.items():
            recorded = json.loads(path.read_text()) if path.exists() else {}
            merged = {name: each for name, each in {**recorded, **answers}.items() if name in all_names}
            unfinished = path.with_suffix(".new")
            unfinished.write_text(json.dumps(dict(sorted(merged.items())), indent=1, ensure_ascii=False) + "\n")
            unfinished.replace(path)
    finally:
        os.close(lock)
