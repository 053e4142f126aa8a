"""What the workers of a native lane run before they are ready, beside the example: what costs more the first time is
paid there, not by the first requests.

    items   the archive's samples (`sample_input*` and `warmup/`), as the handler made them, and the example at every
            size of `pad_to`; one of each shape
    sizes   one row and the largest batch, then those between that csrc/buckets.h names

The example at one row and the largest batch has to be answered; the rest is run as far as time allows. When the batch
size is raised, workers run the new sizes between two batches (csrc/worker_warm_up.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from pyserve.errors import JsonObject
from pyserve.proof.probe_inputs import InputDomain, padded_examples
from pyserve.torch_error import cause_of

# Of the time that a worker has to start, the share in which it may begin to run another item.
ITEMS_SHARE_MAX = 0.25
# Seconds in which a worker that starts may begin to run a size between one row and the largest batch. One that serves
# takes a second at most.
SIZES_LIMIT_S = 5.0
LEFT_OUT_MAX = 8


class WarmUpItem(NamedTuple):
    """Something to run.

    Attributes:
        name: for a person: a file of the archive, or a size.
        inputs: one item on the host, [1, ...] per input.
    """

    name: str
    inputs: list[torch.Tensor]


def warm_up_items(
    example: Sequence[torch.Tensor], domains: Sequence[InputDomain], answered: Mapping[str, Sequence[Any]],
    usual: Sequence[torch.Tensor],
) -> list[WarmUpItem]:  # fmt: skip
    """What to run beside the example: one item of each shape that it has not.

    Args:
        example: one item, [1, ...] per input; ``domains`` says which sizes it may have.
        answered: inputs of samples that the model has answered, by their names.
        usual: the item that is run anyway, as requests bring it.
    """
    seen = {_kind(usual)}
    items = []
    candidates = [(name, list(inputs)) for name, inputs in answered.items() if _is_item(inputs, len(example))]
    candidates += [(name, inputs) for inputs, name in padded_examples(example, domains)]
    for name, inputs in candidates:
        kind = _kind(inputs)
        if kind not in seen:
            seen.add(kind)
            items.append(WarmUpItem(name, inputs))
    return items


def _is_item(inputs: Sequence[Any], count: int) -> bool:
    """Whether it is what the engine takes for one request. Handlers of an archive's own may make anything."""
    return len(inputs) == count and all(
        isinstance(each, torch.Tensor) and each.device.type == "cpu" and each.dim() >= 1 and each.shape[0] == 1
        for each in inputs
    )


def _kind(inputs: Sequence[torch.Tensor]) -> tuple[tuple[torch.dtype, torch.Size], ...]:
    return tuple((each.dtype, each.shape) for each in inputs)


def set_warm_up(core: Any, items: Sequence[WarmUpItem], startup_timeout_s: float) -> None:
    """Hands it to a ``_core.Lane`` that has had no workers yet."""
    core.set_warm_up(
        items=[item.inputs for item in items], items_limit_s=ITEMS_SHARE_MAX * startup_timeout_s,
        sizes_limit_s=SIZES_LIMIT_S,
    )  # fmt: skip


def warm_up_findings(core: Any, items: Sequence[WarmUpItem]) -> JsonObject:
    """For the model's description: rows of batches that were run, of the example and of what else there was, and what
    was left out; empty before workers have run anything."""
    names = ["example", *(item.name for item in items)]
    run: dict[str, list[int]] = {}
    left_out = []
    for number, rows, cause in core.warm_up_runs():
        if cause:
            left_out.append(f"{names[number]}, {rows} row{'s' if rows > 1 else ''}: {cause_of(cause) or cause}")
        else:
            run.setdefault(names[number], []).append(rows)
    if len(left_out) > LEFT_OUT_MAX:
        left_out[LEFT_OUT_MAX:] = [f"and {len(left_out) - LEFT_OUT_MAX} more"]
    findings: JsonObject = {"rows": run} if run else {}
    return findings | ({"leftOut": left_out} if left_out else {})
