"""What every model of a server shares, passed down in one object."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from dataclasses import dataclass, field

from pyserve.config.config import Config
from pyserve.engine import Engine
from pyserve.lanes.loop_guard import LoopGuard
from pyserve.lanes.lost_devices import LostDevices
from pyserve.lanes.spawner import Spawner
from pyserve.lanes.stuck import StuckThreads
from pyserve.request.descriptors import DescriptorLimit
from pyserve.request.messages import ErrorFormat
from pyserve.security.tokens import Tokens
from pyserve.telemetry.metrics import Metrics
from pyserve.telemetry.recent import RecentErrors
from pyserve.telemetry.spans import Tracer


@dataclass
class Services:
    """Constant while the server runs.

    Attributes:
        stuck: threads that do not come to an end.
        lost_devices: devices that answer nobody any more.
        loop_guard: interrupts archives' own code on the loop.
        tokens: None if no call needs a key.
        tracer: None if nobody wants spans.
        descriptors: of this process.
        recent_errors: what was answered lately, for the console.
        choosing: held by the model for which backends are being made and tried.
        laying_out: held by the model whose layout is being tried.
    """

    config: Config
    engine: Engine
    metrics: Metrics
    preprocess_pool: Executor
    spawner: Spawner
    error_format: ErrorFormat
    tokens: Tokens | None = None
    tracer: Tracer | None = None
    descriptors: DescriptorLimit = field(default_factory=DescriptorLimit)
    stuck: StuckThreads = field(default_factory=StuckThreads)
    lost_devices: LostDevices = field(default_factory=LostDevices)
    loop_guard: LoopGuard = field(default_factory=LoopGuard)
    choosing: asyncio.Lock = field(default_factory=asyncio.Lock)
    recent_errors: RecentErrors = field(default_factory=RecentErrors)
    laying_out: asyncio.Lock = field(default_factory=asyncio.Lock)
