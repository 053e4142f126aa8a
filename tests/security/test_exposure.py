"""What is said at start of a server that runs as root and can be reached from elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from pyserve.config.address import Address
from pyserve.config.config import Config
from pyserve.security.exposure import exposure_notes

EVERYWHERE = Address("0.0.0.0", 8080)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, ""),
        ({"inference_address": Address("::1", 8080)}, ""),
        ({"inference_address": Address(path="/run/x.sock")}, ""),
        ({"inference_address": EVERYWHERE}, "http://0.0.0.0:8080 (inference)"),
        ({"metrics_address": EVERYWHERE}, "http://0.0.0.0:8080 (metrics)"),
        ({"metrics_address": EVERYWHERE, "enable_metrics_api": False}, ""),
        ({"grpc_inference_address": "::"}, "(grpc_inference)"),
        ({"grpc_inference_address": "::", "enable_grpc": "false"}, ""),
    ],
)
def test_root_with_a_public_address_is_warned_once_and_nobody_else(settings: dict[str, Any], named: str) -> None:
    notes = exposure_notes(Config(**settings), user=0)
    assert len(notes) == bool(named)
    for kind, text in notes:
        assert kind == "warning" and named in text and "\n" not in text
    assert exposure_notes(Config(**settings), user=1000) == []
