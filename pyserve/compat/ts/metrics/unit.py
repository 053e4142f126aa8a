"""Units of metrics."""

from pyserve.telemetry.custom_metrics import UNITS


class Units:
    """Short names of units -> long ones."""

    def __init__(self) -> None:
        self.units = dict(UNITS)
