"""Devices that answer nobody any more, and what follows from that.

A device is lost when a kernel reads where it must not, when the machine loses it, or when it does not come to the end
of what it runs. Nothing in this process can use it then: another process is to take this one's place, see
`server.main`. The next server is told, so that one that is lost again and again is left alone for a while:

    lost at most ``device_losses_max`` times in a row    its models are loaded again at once
    once more                   they FAIL, and are tried again after PAUSE_FIRST_S, then after twice as long each time
    while a model is loaded     that model alone FAILS, likewise

Loop thread only.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass

from pyserve.errors import ModelLoadError
from pyserve.lanes.limited_runs import EndlessError
from pyserve.torch_error import cause_of

log = logging.getLogger(__name__)

Probe = Callable[[str, float], tuple[str, str]]

LOSSES_NAME = "device-losses.json"
"""Under which the server keeps them for the next one."""
PAUSE_FIRST_S = 30.0
PAUSE_MAX_S = 600.0
PROBE_S = 0.8
"""How long a device may take to write one number, before it is taken for busy."""
HEALTHY_S = 60.0
"""A device that was in use again for as long is taken for well."""


@dataclass(frozen=True)
class DeviceLoss:
    """What happened to ``device``, in the driver's words if there are any."""

    device: str
    reason: str


class DeviceLostError(ModelLoadError):
    """A model is not loaded because its device was lost too often."""

    may_pass = True


@dataclass
class _Record:
    """Of a device, or of a model that was loaded when one was lost.

    Attributes:
        count: losses in a row.
        at: of the last one, ``clock()``.
        text: what happened.
    """

    count: int
    at: float
    text: str

    def pause_s(self, free: int) -> float:
        """How long it is left alone, if ``free`` losses in a row are nothing special."""
        return 0.0 if self.count <= free else min(PAUSE_MAX_S, PAUSE_FIRST_S * 2.0 ** min(self.count - free - 1, 16))


class LostDevices:
    """The devices that were lost in this process, and how often in those before it.

    Args:
        kept: what the server before this one left, see `record`.
        probe: gives ``well``, ``lost`` or ``silent``, and what the device says, within a time in seconds; any thread.
        losses_max: see the module.
        clock: seconds, the same in all processes since the machine was started.

    Attributes:
        loss: has the first one of this process.
    """

    def __init__(
        self, kept: bytes | None = None, probe: Probe = lambda device, limit_s: ("well", ""),
        clock: Callable[[], float] = time.monotonic, losses_max: int = 2,
    ):  # fmt: skip
        self.loss: asyncio.Future[DeviceLoss] = asyncio.get_running_loop().create_future()
        self._probe = probe
        self._clock = clock
        self._losses_max = losses_max
        self._lost: dict[str, DeviceLoss] = {}
        self._culprits: set[str] = set()  # models that could not be loaded, since they broke their device
        self._devices, self._models = _read(kept)

    def note(self, device: str, reason: str) -> None:
        """The device is lost. Only the first call about one does anything."""
        if device in self._lost:
            return
        self._lost[device] = loss = DeviceLoss(device, reason)
        log.error("the device %s is lost, and with it all that this process has on it: %s", device, reason)
        if not self.loss.done():
            self.loss.set_result(loss)

    def get(self, device: str) -> DeviceLoss | None:
        """What happened to it in this process; None of one that works."""
        return self._lost.get(device)

    def counts(self) -> dict[str, int]:
        """How often in a row each device was lost, in this process and those before it."""
        counts = {device: record.count for device, record in self._devices.items()}
        return counts | {device: counts.get(device, 0) + 1 for device in self._lost}

    def left_alone(self, device: str) -> str:
        """Why no model is to be put on the device now; ``""`` if one may."""
        record = self._devices.get(device)
        rest_s = 0.0 if record is None else record.at + record.pause_s(self._losses_max) - self._clock()
        if record is None or rest_s <= 0:
            return ""
        return (
            f"the device {device} was lost {record.count} times in a row ({record.text}) and is left alone for another "
            f"{rest_s:.0f} s; the model is tried again by itself. If the device is broken, take it out of deviceIds"
        )

    async def check(self, device: str, label: str, limit_s: float) -> None:
        """Whether the model ``label`` can be loaded on the device. Nothing is lost if not.

        Args:
            limit_s: how long the device may take to begin to work.

        Raises:
            DeviceLostError: not now.
        """
        if device == "cpu":
            return
        self._check_records(device, label)
        state, text = await asyncio.to_thread(self._probe, device, limit_s)
        if state != "well":
            text = cause_of(text) or "it does not answer"
            raise DeviceLostError(f"{label} cannot be loaded: the device {device} does not work: {text}",
                                  detail={"reason": "device lost", "text": text})  # fmt: skip

    async def look(self, device: str, label: str, error: Exception, text: str) -> None:
        """Loading the model ``label`` failed with ``error``, perhaps as it broke the device for all that run there.

        Args:
            text: of ``error``, for people.
        """
        if device == "cpu" or isinstance(error, DeviceLostError):
            return
        state, why = await asyncio.to_thread(self._probe, device, PROBE_S)
        if state == "lost" or isinstance(error, EndlessError):
            self._culprits.add(label)
            self.note(device, why or text)

    def _check_records(self, device: str, label: str) -> None:
        text = self.left_alone(device)
        record = self._models.get(label)
        if not text and record is not None:
            rest_s = record.at + record.pause_s(0) - self._clock()
            if rest_s > 0:
                text = f"{record.text} when it was loaded; it is tried again by itself in {rest_s:.0f} s"
        if text:
            raise DeviceLostError(f"{label} cannot be loaded: {text}", detail={"reason": "device lost", "text": text})

    def record(self, loading: Collection[str], *, is_in_use: bool) -> bytes:
        """What the next server is to know.

        Args:
            loading: models that were being loaded on the device that was lost.
        is_in_use: whether others were served there, so that it may have been their fault.
        """
        now = self._clock()
        for loss in self._lost.values():
            for label in {*loading, *self._culprits}:
                text = f"the device {loss.device} was lost ({loss.reason})"
                self._models[label] = _next(self._models.get(label), text, now, 0)
            if is_in_use or not (loading or self._culprits):
                before = self._devices.get(loss.device)
                self._devices[loss.device] = _next(before, loss.reason, now, self._losses_max)
        records = {"devices": self._devices, "models": self._models}
        return json.dumps(records, default=asdict).encode()


def _next(before: _Record | None, text: str, now: float, free: int) -> _Record:
    is_in_a_row = before is not None and now - before.at < before.pause_s(free) + HEALTHY_S
    return _Record(before.count + 1 if before is not None and is_in_a_row else 1, now, text)


def _read(kept: bytes | None) -> tuple[dict[str, _Record], dict[str, _Record]]:
    try:
        found = json.loads(kept or b"{}")
    except ValueError:
        found = {}
    devices, models = ({name: _Record(**each) for name, each in found.get(kind, {}).items()}
                       for kind in ("devices", "models"))  # fmt: skip
    return devices, models
