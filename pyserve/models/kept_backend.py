"""The backend that an earlier start has chosen for a model, loaded before its first request.

In the loading thread.
"""

from __future__ import annotations

import logging

from pyserve.archive.archive import Archive
from pyserve.backends.kept import read_choice, read_made
from pyserve.backends.shown import shown
from pyserve.backends.table import BACKENDS, TORCHSCRIPT
from pyserve.errors import ModelLoadError
from pyserve.lanes.network import Network
from pyserve.models.backend_network import Split, compare_kept, load_backend, prove_backend, released_unless_used
from pyserve.proof.native_proof import BUDGET_S

log = logging.getLogger(__name__)


def on_kept_backend(archive: Archive, network: Network, *, batch_size: int, split: Split) -> Network:
    """``network`` on the backend that an earlier start has chosen; as it is if none has, or that cannot be used now.

    Takes ``network``: it is released if another comes back.
    """
    choice = read_choice(archive, network.precision, batch_size, split.runners_max)
    if choice is None:
        return network
    # The rest of a choice that is not final is found out behind the first requests, see `EngineChoice`.
    found = shown(choice.backend, choice.reason, choice.tried, state="settled" if choice.is_final else "making")
    if choice.backend == TORCHSCRIPT:
        network.findings["backend"] = found
        return network
    label = BACKENDS[choice.backend].label
    try:
        made = read_made(archive, choice.backend, network.precision)
        if made is None:
            raise ModelLoadError("what was made for it is not in the cache any more")
        with released_unless_used(load_backend(archive, network, made, split)) as candidate:
            problem = compare_kept(network, candidate) or prove_backend(network, candidate, batch_size, BUDGET_S)
            if problem:
                raise ModelLoadError(f"it gives other answers: {problem}")
    except ModelLoadError as error:
        log.warning("%s begins on TorchScript, not on %s, which was chosen before: %s",
                    network.context.model_name, label, error.message)  # fmt: skip
        return network
    candidate.findings["backend"] = found
    log.info("%s runs on %s, as was chosen before: %s", network.context.model_name, label, choice.reason)
    network.release()
    return candidate
