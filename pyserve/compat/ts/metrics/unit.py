"""Units of metrics."""

from __future__ import annotations

from pyserve.telemetry.custom_metrics import UNITS


class Units:
    """Short names of units -> long ones; None stands for no unit."""

    def __init__(self) -> None:
        self.units: dict[str | None, str] = {None: "unit"}
        self.units.update(UNITS)
