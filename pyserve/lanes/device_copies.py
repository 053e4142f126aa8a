"""One network on several accelerators: its weights once on each that a worker is to use.

Any thread, but for what says otherwise.
"""

from __future__ import annotations

import logging
from typing import Any

from pyserve import devices
from pyserve.errors import ModelLoadError, OutOfMemoryError, is_memory_error
from pyserve.lanes.network import Network
from pyserve.proof.batch_probe import outcome
from pyserve.proof.comparison import ROUNDING, difference
from pyserve.torch_error import cause_of

log = logging.getLogger(__name__)

# Of the weights' bytes, for what a batch needs beside them. Only what surely cannot run is refused: how much more it is
# shows when the workers try their batches.
_MARGIN = 0.05
# Items that a copy is asked about.
_PROBES_MAX = 4
_FIX = "unregister a model that runs there, or name another device in deviceIds of model-config.yaml"


def spread(network: Network, workers: int, label: str) -> None:
    """Loads copies of the network, so that each of ``workers`` workers has one on its device, and tries them.

    Raises:
        OutOfMemoryError: a device that ``network.is_bound`` to has no room for it.
        ModelLoadError: it cannot be loaded there, or answers otherwise than on the first.
    """
    for device in list(network.devices[1:]):
        if len(network.copies) + 1 >= workers:
            break
        if device in network.copies:
            continue
        try:
            network.copies[device] = _copy(network, device, label)
        except OutOfMemoryError as error:
            if network.is_bound:
                raise
            log.warning("%s; its workers use the others", error.message)
            network.devices.remove(device)


def is_spread(network: Network, workers: int) -> bool:
    """Whether there are as many copies as ``workers`` workers can use."""
    return len(network.copies) + 1 >= min(workers, len(network.devices))


def forget_unused(network: Network, core: Any, workers: int) -> bool:
    """Lets go of copies that none of ``workers`` workers is to have; loop thread. Returns whether there were any.

    Args:
        core: their ``_core.Lane``.
    """
    used = {row["device"] for row in core.workers()}
    unused = [each for each in network.devices[max(1, workers) :] if each in network.copies and each not in used]
    for device in unused:
        del network.copies[device]
    if unused:
        core.set_models(network.models)
    return bool(unused)


def _copy(network: Network, device: str, label: str) -> Any:
    check_room(label, device, network.torch_model.weights_size)
    log.info("%s: its weights go to %s too", label, device)
    try:
        copy = network.torch_model.copy_on(device)
        _compare(network, copy, device, label)
    except RuntimeError as error:
        if is_memory_error(error):
            raise no_room(label, device) from error
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(f"{label}: it cannot be loaded onto {device}: {cause_of(str(error))}") from error
    return copy


def _compare(network: Network, copy: Any, device: str, label: str) -> None:
    """Asks the network and a copy of it the same.

    Raises:
        ModelLoadError: they do not answer the same.
    """
    items = [network.example]
    if network.batches is not None:
        items += [list(item) for item in network.batches.rows.items]
    # Numbers of fp32 may be multiplied as shorter ones there, not in the same way on two devices of different kinds.
    tolerance = max(ROUNDING["fp16"], network.tolerance)
    first, other = network.torch_model.instance(), copy.instance()
    for item in items[:_PROBES_MAX]:
        expected = outcome(lambda inputs: network.run_on(first, inputs), item)
        got = outcome(lambda inputs: network.run_on(other, inputs, device), item)
        if not _differ(expected, got, tolerance):
            continue
        if _differ(expected, outcome(lambda inputs: network.run_on(first, inputs), item), tolerance):
            return  # not from itself either: it draws random numbers
        told = f"ends in {got.__name__}" if isinstance(got, type) else "answers otherwise"
        raise ModelLoadError(
            f"{label}: on {device} it {told} than on {network.device} when both are asked the same, so one of the two "
            "cannot be relied on; name the other one in deviceIds of model-config.yaml"
        )


def _differ(expected: Any, got: Any, tolerance: float) -> bool:
    if isinstance(expected, type) or isinstance(got, type):
        return expected is not got
    return not difference(expected, got) <= tolerance


def check_room(label: str, device: str, weights_size: int) -> None:
    """Sees to it that ``device`` has room for weights of so many bytes. Makes a context on it, if it is an accelerator.

    Raises:
        OutOfMemoryError: it has not; the text names both numbers.
    """
    index = devices.index_of(device)
    if index is None:
        return
    needed = weights_size + int(weights_size * _MARGIN)
    found = devices.memory(index)
    if found is not None and found[0] < needed:
        devices.give_back()  # of models that are gone
        found = devices.memory(index)
    if found is not None and found[0] < needed:
        raise no_room(label, device, needed)


def no_room(label: str, device: str, needed: int | None = None) -> OutOfMemoryError:
    """Why ``label`` is not loaded onto ``device``; ``needed`` bytes, if that is known."""
    index = devices.index_of(device)
    found = None if index is None else devices.memory(index)
    free, total = (None, None) if found is None else found
    needs = "more memory than is free" if needed is None else _megabytes(needed)
    there = "" if free is None or total is None else f", where {_megabytes(free)} of {_megabytes(total)} are free"
    is_too_large = total is not None and needed is not None and needed > total
    fix = "use a device with more memory, or a lower precision" if is_too_large else _FIX
    text = f"{label} needs {needs} on {device}{there}; {fix}"
    error = OutOfMemoryError(text, detail={"text": text, "device": device, "needed": needed, "free": free})
    error.may_pass = not is_too_large
    return error


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
