"""What a campaign prints and writes."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.serving import ROOT

SHOWN_MAX = 12


@dataclass
class ClassReport:
    """Of one class of faults; times in seconds."""

    count: int = 0
    slowest_recovery_s: float = 0.0
    slowest_step: int = 0
    recoveries_s: list[float] = field(default_factory=list)
    longest_lie_s: float = 0.0
    longest_lie: str = ""
    longest_silence_s: float = 0.0


@dataclass
class Report:
    """Of one campaign.

    Attributes:
        start_s: from the start of the server until every model answered.
        violations: each with the step it belongs to, if it belongs to one.
    """

    seed: int
    commit: str
    command: str
    has_namespaces: bool
    left_out: dict[str, str] = field(default_factory=dict)
    start_s: float = 0.0
    sent: int = 0
    right: int = 0
    other_version: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)
    classes: dict[str, ClassReport] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def of(self, fault: str) -> ClassReport:
        return self.classes.setdefault(fault, ClassReport())

    def violate(self, text: str) -> None:
        self.violations.append(text)

    @property
    def text(self) -> str:
        outcomes = self.outcomes
        lines = [
            f"seed {self.seed}, commit {self.commit}, {self.seconds:.0f} s; "
            f"namespaces of its own: {'yes' if self.has_namespaces else 'no'}; first start {self.start_s:.1f} s",
            f"replay: {self.command}",
            *(f"left out: {name}: {reason}" for name, reason in sorted(self.left_out.items())),
            f"sent {self.sent}, answered right {self.right + outcomes['other version']}, "
            + ", ".join(f"{name} {outcomes[name]}" for name in ("lost", "cut", "hung", "doubled", "swapped", "wrong")),
            f"refused {outcomes['refused']}: "
            + (", ".join(f"{status} {count}" for status, count in sorted(self.refused.items())) or "none"),
            f"attempts that found no server: {outcomes['unreachable']}",
            "",
            f"{'fault':<32}{'count':>6}{'median':>9}{'slowest recovery':>18}{'longest lie':>13}{'silence':>9}",
        ]
        for name, each in sorted(self.classes.items()):
            times = sorted(each.recoveries_s)
            median = times[len(times) // 2] if times else 0.0
            lines.append(
                f"{name:<32}{each.count:>6}{median:>7.2f} s{each.slowest_recovery_s:>16.2f} s"
                f"{each.longest_lie_s * 1000:>10.0f} ms{each.longest_silence_s * 1000:>6.0f} ms  {each.longest_lie}"
            )
        total = sum(each.count for each in self.classes.values())
        lines += ["", f"{total} faults, {len(self.violations)} violations"]
        lines += [f"VIOLATION {text}" for text in self.violations[:SHOWN_MAX]]
        if len(self.violations) > SHOWN_MAX:
            lines.append(f"... and {len(self.violations) - SHOWN_MAX} more")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """The text, and all of it as JSON beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text + "\n")
        path.with_suffix(".json").write_text(json.dumps(self, default=vars, indent=1))


def commit() -> str:
    """Of the tree, with ``+`` when something in it is changed."""
    named = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=ROOT, capture_output=True,
                           text=True, check=False)  # fmt: skip
    return named.stdout.strip() or "unknown"
