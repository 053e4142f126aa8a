"""Trying batches of a native model beside its requests, which have smaller ones meanwhile. Loop thread only."""

from __future__ import annotations

import logging
from collections.abc import Callable

from pyserve.lanes.lane import Lane
from pyserve.lanes.limited_runs import EndlessError, limited_runs
from pyserve.proof.native_proof import BUDGET_S, BatchProof

log = logging.getLogger(__name__)


async def try_batches(lane: Lane, proof: BatchProof, on_shown: Callable[[], None]) -> None:
    """Tries them up to the batch size of ``lane``; what is wrong with them is in ``proof`` afterwards.

    Args:
        on_shown: called whenever more has been shown.
    """
    try:
        while not (lane.is_draining or proof.is_settled_for(lane.settings.batch_size)):
            await limited_runs(lambda: proof.extend(lane.settings.batch_size, BUDGET_S), stuck=lane.services.stuck,
                               limit_s=lane.settings.startup_timeout_s, label=lane.label, is_served=True)  # fmt: skip
            if not lane.is_draining:
                on_shown()
    except EndlessError as error:
        log.error("%s; its batches stay at %d", error.message, proof.size_max)
        proof.note = proof.note or "trying larger batches did not come to an end"
    except Exception:
        log.exception("%s: trying batches failed; they stay at %d", lane.label, proof.size_max)
        proof.note = proof.note or "trying larger batches failed, see the log"
