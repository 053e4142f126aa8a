"""What was found out about a model before its answers were believed, as the management API shows it."""

from __future__ import annotations

from pyserve.archive.model_config import ModelConfig
from pyserve.errors import JsonObject
from pyserve.lanes.lane import Lane
from pyserve.lanes.native import NativeLane


def checks_of(lane: Lane | None, config: ModelConfig, audit: JsonObject | None) -> JsonObject:
    """``checks`` of a model's description; what has nothing to say is left out.

    ``lane``            why it runs in worker processes although its handler would not need them
    ``conversion``      how an eager model became a graph, and what that was compared on
    ``batchSize``       how many requests share a batch now; ``batches`` what trying them came to, ``batchNote`` why
                        they are fewer than the settings ask for
    ``state``           what calls leave behind in the model, so that each worker has one of its own
    ``optimization``    ``oneDNN layout``, or why it was left out
    ``precisionError``  largest difference to fp32, relative to the largest number
    ``allowed``         what model-config.yaml takes upon itself
    ``audit``           requests that were run again, and how many of them differed
    """
    found: JsonObject = {}
    if lane is not None:
        found |= {
            "lane": lane.reason,
            "batchSize": lane.batch_size_max,
            "batches": lane.batch_probe,
            "batchNote": lane.batch_note,
        }
    if isinstance(lane, NativeLane):
        found |= lane.network.findings
    found["allowed"] = [
        f"{key}: {value}"
        for key, value in (("batchDependent", config.batch_dependent), ("conversion", config.conversion))
        if value not in (None, "auto")
    ]
    found["audit"] = audit
    return {name: value for name, value in found.items() if value not in ("", None, [])}
