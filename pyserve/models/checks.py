"""What was found out about a model before its answers were believed, as the management API shows it."""

from __future__ import annotations

from pyserve.archive.model_config import ModelConfig
from pyserve.errors import JsonObject
from pyserve.lanes.lane import Lane
from pyserve.lanes.native import NativeLane
from pyserve.lanes.python import PythonLane
from pyserve.lanes.warm_up import warm_up_findings


def checks_of(lane: Lane | None, config: ModelConfig, audit: JsonObject | None) -> JsonObject:
    """``checks`` of a model's description; what has nothing to say is left out.

    ``lane``            why it runs in worker processes although its handler would not need them
    ``conversion``      how an eager model became a graph, and what that was compared on
    ``batchSize``       how many requests share a batch now; ``batches`` what trying them came to, ``batchNote`` why
                        they are fewer than the settings ask for
    ``state``           what calls leave behind in the model, so that each worker has one of its own
    ``backend``         what runs the network (``chosen``) and why (``reason``), whether others are still being made or
                        tried (``state``), and what was ``tried``: the shortest run of one item and of ``batch_max`` in
                        ms, the largest difference to TorchScript, why it was ``refused``
    ``optimization``    ``oneDNN layout``, or why it was left out
    ``pixels``          whether pictures go to the accelerator as bytes, and what it makes of them
    ``jpegDecoder``     that JPEG is decoded by the accelerator, which makes other pixels
    ``devices``         what became of devices that the model's code names
    ``memoryFormat``    ``channels_last``, and whether that was chosen here
    ``precisionError``  largest difference to fp32, relative to the largest number
    ``precisionAgreement``  of int8: how far it agrees with fp32 on the calibration files: their share of ``top1``,
                        ``similarity`` (the cosine), ``largest`` and ``mean`` difference
    ``graphs``          on an accelerator: ``in use``, or why its calls are not recorded and replayed
    ``padding``         there too: ``in use``, or why batches are not filled up to one of the ``buckets``
    ``warmUp``          the ``rows`` of batches that workers ran before requests, of the example and of what else there
                        was, and what was ``leftOut``
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
    if isinstance(lane, PythonLane):
        found["warmUp"] = lane.warm_up_findings()
    if isinstance(lane, NativeLane):
        found["warmUp"] = warm_up_findings(lane.core, lane.network.warm_up)
        found |= lane.network.findings | lane.batching.findings()
    found["allowed"] = [
        f"{key}: {value}"
        for key, value in (("batchDependent", config.batch_dependent), ("conversion", config.conversion))
        if value not in (None, "auto")
    ]
    found["audit"] = audit
    return {name: value for name, value in found.items() if value not in ("", None, [], {})}
