"""What model-config.yaml says about batches on accelerators, and what is logged and shown of them."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyserve.archive.model_config import ModelConfig
from pyserve.lanes.device_batching import DeviceBatching, batching_options

ROW = [torch.zeros(1, 3)]


class Core:
    """Stands in for ``_core.Lane``."""

    def __init__(self) -> None:
        self.options: dict[str, Any] | None = None
        self.notes = {"graphs": "", "padding": "", "sizes": [1, 2]}

    def set_batching(self, **options: Any) -> None:
        self.options = options

    def batching_notes(self) -> dict[str, Any]:
        return self.notes


def network_on(device: str, options: dict[str, Any]) -> Any:
    return SimpleNamespace(device=device, batching=options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", {}),
        (b"graphs: true", {}),
        (b"graphs: false", {"no_graphs": "switched off by 'graphs: false' in model-config.yaml"}),
        (b"batchBuckets: false", {"no_padding": "switched off by 'batchBuckets: false' in model-config.yaml"}),
        (b"batchBuckets: [8, 2]", {"sizes": [2, 8]}),
        (b"batchDependent: allowed",
         {"no_padding": "answers may depend on the batch, as 'batchDependent: allowed' says"}),
    ],
)  # fmt: skip
def test_model_config_decides(text: bytes, expected: dict[str, Any]) -> None:
    assert batching_options(ModelConfig.parse(text, "m"), [ROW]) == {"rows": [ROW], **expected}


def test_what_is_left_out_is_logged_once_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    core = Core()
    batching = DeviceBatching(core, "m 1.0", network_on("cuda:0", {"rows": []}))
    assert core.options == {"rows": []}
    assert batching.findings() == {"graphs": "in use", "padding": "in use", "buckets": [1, 2]}
    core.notes["graphs"] = "the model cannot be recorded: it waits"
    with caplog.at_level(logging.INFO, "pyserve.lanes.device_batching"):
        batching.look()
        batching.look()
    assert [record.getMessage() for record in caplog.records] == [
        "m 1.0: graphs are left out: the model cannot be recorded: it waits"
    ]
    assert batching.findings()["graphs"] == "the model cannot be recorded: it waits"


def test_nothing_is_said_of_models_on_the_cpu() -> None:
    core = Core()
    batching = DeviceBatching(core, "m 1.0", network_on("cpu", {"rows": []}))
    batching.look()
    assert core.options is None and batching.findings() == {}
