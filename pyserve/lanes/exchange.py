"""Another model takes the place of the one that a native lane runs, while requests come in.

    asked for ──> each worker warms it up between its batches ──> all run it: the lane has the other network
                     └──> one cannot: all go back to what they had

Nobody's request is lost or answered twice: a batch ends on the model that it began on. Loop thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from pyserve.lanes.limits import SWEEP_INTERVAL_S
from pyserve.lanes.native import NativeLane
from pyserve.lanes.network import Network
from pyserve.torch_error import cause_of

log = logging.getLogger(__name__)

_ENDS = "it is being unregistered"


async def exchange(lane: NativeLane, network: Network) -> str:
    """Has the workers of ``lane`` run ``network`` from one of their next batches on.

    Takes as long as the workers need to warm it up; their runs have the limits of a request's. Cancelled, it leaves
    workers of either kind behind: only for a lane that is about to be closed.

    Args:
        network: on the CPU, for the same handler and inputs, and of the same structure of outputs.

    Returns:
        ``""`` once every worker runs it, or why all of them run what they had.
    """
    former = lane.network
    if network.handler is not former.handler or network.restored is not former.restored:
        raise ValueError("only networks of one handler whose outputs have one structure can be exchanged")
    lane.offered = network.batches
    lane.apply_limits()  # before a worker runs a batch that was shown of the former one only
    try:
        return await _exchanged(lane, network, former)
    finally:
        lane.offered = None
        if not lane.is_draining:
            lane.apply_limits()


async def _exchanged(lane: NativeLane, network: Network, former: Network) -> str:
    lane.core.exchange_model(network.torch_model)
    refusal = await _ended(lane)
    if refusal and not lane.is_draining:
        log.warning("%s: its workers continue with the model that they have: %s", lane.label, refusal)
        lane.core.exchange_model(former.torch_model)
        lane.workers.restore()
        await _ended(lane)
        lane.core.set_models(former.models)
        return refusal
    if not refusal:
        lane.core.set_models(network.models)
        lane.network = network
        former.batches = None  # whose runs know the network: nothing else keeps its weights
    return refusal


async def _ended(lane: NativeLane) -> str:
    """Waits until each worker has taken what it was offered, or one cannot. Returns why it cannot, or ``""``."""

    def is_over() -> bool:
        pending, refusal = lane.core.exchange_state()
        return not pending or bool(refusal) or lane.is_draining

    while not is_over():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(lane.services.engine.wait_for_workers(is_over), SWEEP_INTERVAL_S)
        lane.watch_workers()  # a run may not come to an end, though no request waits
    if lane.is_draining:
        return _ENDS
    refusal = str(lane.core.exchange_state()[1])
    return refusal and (cause_of(refusal) or "no text")
