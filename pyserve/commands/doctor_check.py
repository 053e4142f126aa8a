"""A line of the list that ``pyserve doctor`` prints."""

from __future__ import annotations

from dataclasses import dataclass

PASS, NOTE, WARN, FAIL = "PASS", "NOTE", "WARN", "FAIL"
LEVELS = (PASS, NOTE, WARN, FAIL)


@dataclass(frozen=True)
class Check:
    """One line of the list; ``fix`` says how to fix it.

    Attributes:
        level: one of LEVELS. What is noted may be as it is: it is needed by some, or better otherwise for some.
    """

    level: str
    name: str
    text: str
    fix: str = ""
