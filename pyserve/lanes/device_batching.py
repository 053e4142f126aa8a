"""How batches of a model run on an accelerator: filled up to sizes that were warmed up, and replayed as graphs.

The workers try both before they use them (`csrc/batch_runner.cpp`). What they leave out is logged once, and shown in
the model's description.

Loop thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from pyserve.archive.model_config import ModelConfig
from pyserve.errors import JsonObject
from pyserve.lanes.network import Network

log = logging.getLogger(__name__)


def batching_options(config: ModelConfig, rows: Sequence[Sequence[torch.Tensor]]) -> dict[str, Any]:
    """What ``Lane.set_batching`` takes.

    Args:
        rows: items like the example, each [1, ...] per input, made to disagree.
    """
    options: dict[str, Any] = {"rows": [list(row) for row in rows]}
    if config.graphs is False:
        options["no_graphs"] = "switched off by 'graphs: false' in model-config.yaml"
    if config.batch_buckets is False:
        options["no_padding"] = "switched off by 'batchBuckets: false' in model-config.yaml"
    elif config.batch_dependent == "allowed":
        options["no_padding"] = "answers may depend on the batch, as 'batchDependent: allowed' says"
    if isinstance(config.batch_buckets, list):
        options["sizes"] = config.batch_buckets
    return options


class DeviceBatching:
    """Of one native lane.

    Args:
        core: a ``_core.Lane``.
        label: ``name version``, for the log.
        network: whose ``batching`` is of `batching_options`.
    """

    def __init__(self, core: Any, label: str, network: Network):
        self._core = core
        self._label = label
        self._is_used = network.device != "cpu"
        self._logged: set[str] = set()
        if self._is_used:
            core.set_batching(**network.batching)

    def look(self) -> None:
        """Logs what has been left out since the last time."""
        if not self._is_used:
            return
        notes = self._core.batching_notes()
        for name, text in (("graphs are", notes["graphs"]), ("filling up batches is", notes["padding"])):
            if text and name not in self._logged:
                self._logged.add(name)
                log.info("%s: %s left out: %s", self._label, name, text)

    def findings(self) -> JsonObject:
        """For the model's description; empty on a CPU."""
        if not self._is_used:
            return {}
        notes = self._core.batching_notes()
        return {
            "graphs": notes["graphs"] or "in use",
            "padding": notes["padding"] or "in use",
            "buckets": notes["sizes"],
        }
