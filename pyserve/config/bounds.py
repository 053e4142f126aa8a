"""Bounds of the numbers that configure a model, in one table.

The same bounds hold wherever a number comes from: ``model-config.yaml``, management parameters, ``config.properties``.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyserve.errors import InvalidModelError, ServeError, shown


@dataclass(frozen=True)
class Bounds:
    """Smallest and largest value, both allowed, and the unit for messages."""

    least: int
    most: int
    unit: str = ""


_DAY_S = 86_400
_HOUR_MS = 3_600_000

BOUNDS: dict[str, Bounds] = {
    "workers_min": Bounds(0, 1024, "workers"),
    "workers_max": Bounds(0, 1024, "workers"),
    "batch_size": Bounds(1, 65_536, "requests"),
    "min_batch": Bounds(1, 65_536, "requests"),
    "max_batch_delay_ms": Bounds(0, _HOUR_MS, "ms"),
    "response_timeout_s": Bounds(1, _DAY_S, "s"),
    "startup_timeout_s": Bounds(1, _DAY_S, "s"),
    "backend_trial_s": Bounds(0, 3600, "s"),
    "queue_size": Bounds(1, 1_000_000, "requests"),
    "retry_timeout_max_s": Bounds(0, _DAY_S, "s"),
    "client_timeout_ms": Bounds(0, _HOUR_MS, "ms"),
    "parallel_level": Bounds(0, 1024, "devices"),
    "sequence_idle_max_ms": Bounds(0, 24 * _HOUR_MS, "ms"),
    "sequence_timeout_ms": Bounds(0, 24 * _HOUR_MS, "ms"),
    "sequence_queue_size": Bounds(1, 1_000_000, "requests"),
    "sequence_count_max": Bounds(1, 1_000_000, "sequences"),
    "device_id": Bounds(0, 1023),
}
DEVICE_COUNT_MAX = 1024


def validate_setting(
    name: str, value: object, *, label: str | None = None, error: type[ServeError] = InvalidModelError
) -> int:
    """``value`` as an int within ``BOUNDS[name]``.

    Text is not accepted: parse it first, where the caller's rules for text are known.

    Args:
        name: a key of `BOUNDS`.
        value: what was given; only a true ``int`` passes (``True`` and ``4.0`` do not).
        label: what to call it in the message, such as ``"batchSize"``; ``name`` by default.
        error: the class to raise.
    """
    bounds = BOUNDS[name]
    label = label or name
    unit = f" {bounds.unit}" if bounds.unit else ""
    allowed = f"a whole number from {bounds.least} to {bounds.most}{unit}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise error(f"{label} must be {allowed}, not {shown(str(value))} ({type(value).__name__})")
    if not bounds.least <= value <= bounds.most:
        found = str(value) if value.bit_length() <= 128 else f"a number of {value.bit_length()} bits"
        raise error(f"{label} must be {allowed}, not {found}")
    return value
