"""Whether requests of a model are audited, and what a difference means for it."""

from __future__ import annotations

import logging
from dataclasses import replace

from pyserve.devices import CPU
from pyserve.lanes.lane import Lane
from pyserve.lanes.native import NativeLane
from pyserve.models.audit import Audit
from pyserve.models.lane_choice import LaneOptions, open_audit_lane
from pyserve.models.loader import PRECISION_ERROR_MAX
from pyserve.proof.comparison import ROUNDING

log = logging.getLogger(__name__)


def audit_of(options: LaneOptions, lane: Lane) -> Audit | None:
    """The audit of a model that runs in ``lane``; None if its model-config.yaml wants none, or it cannot have one."""
    config = options.archive.config
    if not config.audit_share:
        return None
    if config.sequence_batching:
        log.warning("%s: audit is left out, since a request of a sequence cannot be run alone", options.label)
        return None
    precision = lane.network.precision if isinstance(lane, NativeLane) else "fp32"
    causes = ["batches", "the native lane's optimisations and threads" if lane.is_native else "shared weights"]
    if precision != "fp32":
        causes.append(f"precision {precision}")
    return Audit(
        options.label,
        share=config.audit_share,
        tolerance=tolerance_of(precision, config.precision_error_max, is_on_gpu=options.devices != [CPU]),
        open_lane=lambda: open_audit_lane(replace(options, devices=[CPU], progress=lambda text: None)),
        causes=", ".join(causes),
    )


def tolerance_of(precision: str, error_max: float | None, *, is_on_gpu: bool) -> float:
    """What answers of a model at ``precision`` may differ by from those in fp32 on a CPU.

    Args:
        error_max: ``precisionErrorMax``; what the user allows a lower precision.
        is_on_gpu: whether it computes there, where numbers of fp32 may be multiplied as TF32, as short as fp16's.
    """
    allowed = ROUNDING[precision]
    if precision != "fp32":
        return max(allowed, error_max or PRECISION_ERROR_MAX)
    return max(allowed, ROUNDING["fp16"]) if is_on_gpu else allowed
