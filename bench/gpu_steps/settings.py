"""What a step is told, and what it hands back; imports no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Emit = Callable[[Row], None]


class Lacks(Exception):
    """The machine has not got what the step needs; the text names it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a step is told.

    Attributes:
        tiny: sizes that show that everything runs, and nothing else.
        folder: its own, empty but for its log; removed at the end.
        ends_at: on the clock of ``time.monotonic()``, which all processes share. What a step has not done by then
            is lost, so it does the important things first and leaves out what no longer fits.
    """

    tiny: bool
    folder: Path
    ends_at: float

    @property
    def rows_path(self) -> Path:
        """Where rows go: standard output is open to whatever a library prints."""
        return self.folder / "rows.jsonl"

    @property
    def left_s(self) -> float:
        return self.ends_at - time.monotonic()

    def as_json(self) -> str:
        return json.dumps({"tiny": self.tiny, "folder": str(self.folder), "ends_at": self.ends_at})

    @classmethod
    def of_json(cls, text: str) -> Settings:
        fields = json.loads(text)
        return cls(bool(fields["tiny"]), Path(fields["folder"]), float(fields["ends_at"]))
