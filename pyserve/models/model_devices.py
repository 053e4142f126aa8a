"""What a model says of the devices that it is on."""

from __future__ import annotations

from pyserve.archive.archive import Archive
from pyserve.devices import CPU
from pyserve.lanes.lane import Lane
from pyserve.lanes.native import NativeLane
from pyserve.lanes.worker_rows import WorkerRow
from pyserve.models.placement import Resident


class ModelDevices:
    """The part of `Model` that is about devices.

    Attributes:
        devices: where its workers are to run, in turn: ``["cpu"]`` or names such as ``cuda:0``.
    """

    devices: list[str]
    archive: Archive
    state: str
    wanted_workers: int
    _lane: Lane | None

    def worker_rows(self) -> list[WorkerRow]:
        """The workers, as the management API shows them."""
        raise NotImplementedError

    @property
    def device(self) -> str:
        """Of its first worker."""
        return self.devices[0]

    @property
    def resident(self) -> Resident:
        """What it takes of devices, for the placement of others."""
        used = tuple(self.devices[: max(1, self.wanted_workers)])
        weights = self.archive.weights
        return Resident(used, weights.size if weights is not None and self.state == "LOADING" else 0)

    @property
    def device_type(self) -> str:
        return "cpu" if self.device == CPU else "gpu"

    @property
    def device_ids(self) -> list[int] | None:
        return self.archive.config.device_ids

    @property
    def native_devices(self) -> list[str]:
        """Accelerators that it runs on in this process; none on a CPU, or in worker processes."""
        if self.device == CPU or not isinstance(self._lane, NativeLane):
            return []
        return sorted({row.get("device", self.device) for row in self._lane.core.workers()})

    @property
    def weights_size(self) -> int:
        """Bytes; of one copy."""
        in_file = self.archive.weights.size if self.archive.weights is not None else 0
        return self._lane.weights_size if isinstance(self._lane, NativeLane) else in_file

    @property
    def copies(self) -> int:
        """How often its weights are in memory: in the native lane once for each device that workers use."""
        if isinstance(self._lane, NativeLane):
            return len(self._lane.network.models)
        return 1 if self._lane is None else len(self.worker_rows())
