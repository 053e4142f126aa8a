"""oneDNN's layout for a network that had to answer before it could be shown that the layout changes nothing.

The first start of an eager model ends its conversion while somebody waits. Reading the weights twice more and running a
large network a dozen times would come on top of it, so that one is READY as the graph that it is, which needs no proof.
Behind its first requests another copy is turned into the layout and compared (`load_in_layout`); it takes the place of
the first one between two batches, or is let go of. What is compared is what a later start compares before READY.

Runs in a thread of its own; nothing here touches the event loop.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pyserve.lanes.network import Network
from pyserve.models.backend_network import fresh_proof, released_unless_used
from pyserve.proof.native_proof import find_state, prove_optimization

# Of one run of the model: below it, all of it is over before somebody would notice.
LATER_MIN_S = 0.05
LATER = "oneDNN's layout is compared with the plain graph behind the first requests"
IN_LAYOUT = "oneDNN layout"


def load_in_layout(network: Network, batch_size: int, threads: int) -> tuple[Network | None, str]:
    """``network`` in oneDNN's layout with the same batches shown, or None; and what there is to say of it, perhaps
    nothing.

    Args:
        network: whose ``in_layout`` is there.
        batch_size: the largest batch that may be asked of it now.
        threads: that operators may use.

    Raises:
        ModelLoadError: the weights cannot be read again.
    """
    assert network.in_layout is not None
    torch.set_num_threads(threads)  # of this thread
    model = network.in_layout()
    candidate = replace(
        network, torch_model=model, copies={}, in_layout=None, making=None, findings=dict(network.findings)
    )
    candidate.batches = fresh_proof(network.batches, candidate)
    with released_unless_used(candidate):
        note = _why_not(network, candidate, batch_size)
    if note is not None:
        candidate.release()
        return None, note
    model.settle()  # numbers that are not finite need the plain graph beside it: another copy of the weights
    return candidate, IN_LAYOUT


def _why_not(network: Network, candidate: Network, batch_size: int) -> str | None:
    """What there is to say of ``network`` if it stays as it is; None if ``candidate`` may take its place."""
    model, example = candidate.torch_model, network.example
    if not model.is_optimized:
        return str(model.optimization_note)
    find_state(model, example, is_package=False)
    if model.state:
        return f"left out: {model.state}"
    # The one that serves is the plain graph: nobody need read it a third time.
    if odd := prove_optimization(model, example, network.domains, plain=network.torch_model.run):
        return f"left out: it changes what is computed for {odd}"
    proof, before = candidate.batches, network.batches
    if proof is not None and before is not None:
        size = min(batch_size, before.size_max)
        proof.extend(size)
        if proof.size_max < size:
            return f"left out: {proof.note}"
    return None
