"""The end of a model that is served no more."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyserve.models.model import Model

COLLECT_AFTER_S = 0.2
"""When everybody who waited for the end has continued."""


async def end(model: Model) -> None:
    """Finishes what it has admitted, stops its workers, and gives back what it held.

    A model and its lane refer to each other, so that only the collector of garbage frees them: buffers, weights and
    descriptors would stay until it comes by, which may be many models later. It takes a millisecond, since what was
    there when the server became ready is frozen.
    """
    await model.drain()
    asyncio.get_running_loop().call_later(COLLECT_AFTER_S, gc.collect)
