"""Which of the devices that a model may use it can use: one with room for it, of the kind that it was compiled for."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pyserve import devices
from pyserve.archive.archive import Archive
from pyserve.errors import ModelLoadError, OutOfMemoryError
from pyserve.lanes.device_copies import check_room
from pyserve.proof.package_machine import compiled_for
from pyserve.proof.package_rules import is_compiled

log = logging.getLogger(__name__)


def fitting_devices(archive: Archive, wanted: Sequence[str]) -> list[str]:
    """``wanted`` without those before the first that has room; ``["cpu"]`` for what was compiled for it.

    Reads the archive.

    Raises:
        ModelLoadError: the package was compiled for another kind of device than it is to run on.
        OutOfMemoryError: none has room, or one that model-config.yaml names has none.
    """
    if _runs_on_the_cpu(archive, wanted[0]):
        return [devices.CPU]
    weights = archive.weights
    if weights is None:
        return list(wanted)
    for position, device in enumerate(wanted):
        try:
            check_room(archive.name, device, weights.size)
        except OutOfMemoryError as error:
            if archive.config.device_ids or position == len(wanted) - 1:
                raise
            log.warning("%s; another one is tried", error.message)
        else:
            return list(wanted[position:])
    return list(wanted)


def _runs_on_the_cpu(archive: Archive, device: str) -> bool:
    """Whether it is a package that was compiled for the CPU."""
    weights = archive.weights
    if weights is None or archive.manifest.model_file is not None or weights.suffix != ".pt2":
        return False
    path = weights.as_file()
    kind = compiled_for(path) if is_compiled(path) else ""
    target = device.partition(":")[0]
    if not kind or kind == target:
        return False
    if kind == devices.CPU:
        if archive.config.device_type != "gpu":
            log.info("%s: %s was compiled for the CPU and runs there; compile it again for %s to use that",
                     archive.name, weights.name, target)  # fmt: skip
            return True
        raise ModelLoadError(
            f"{archive.name}: {weights.name} was compiled for the CPU, but model-config.yaml says 'deviceType: gpu'; "
            f"compile it again for {target}, or take deviceType out"
        )
    here = "model-config.yaml says 'deviceType: cpu'" if archive.config.device_type == "cpu" else _here(target)
    raise ModelLoadError(
        f"{archive.name}: {weights.name} was compiled for {kind}, but {here}; compile it again for {target}, or serve "
        f"it where there is {kind}"
    )


def _here(target: str) -> str:
    return (
        f"the accelerators of this server are {target}" if target != devices.CPU else "this server has no accelerator"
    )
