"""What descriptions and commands show of a choice."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

from pyserve.backends.shown import STATES, availability, shown
from pyserve.backends.table import BACKENDS
from pyserve.backends.trial import Tried


def test_it_is_json_whatever_was_measured() -> None:
    tried = [
        Tried("torchscript", 21.9123, 166.04, 8),
        Tried("openvino", math.inf, math.inf, 1, math.inf, 3, "its answer differs"),
    ]
    found = shown("torchscript", "none is quicker", [asdict(each) for each in tried])
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "chosen": "torchscript",
        "state": "settled",
        "reason": "none is quicker",
        "tried": [
            {"backend": "torchscript", "batch_1_ms": 21.9, "batch_max_ms": 166.0, "batch_max": 8, "difference": 0.0},
            {"backend": "openvino", "batch_max": 1, "probes": 3, "refused": "its answer differs"},
        ],
    }


def test_what_was_not_tried_is_left_out() -> None:
    assert shown("torchscript", "it begins there", state="making") == {
        "chosen": "torchscript", "state": "making", "reason": "it begins there",
    }  # fmt: skip
    assert STATES == ("settled", "making", "trying")


def test_every_backend_of_the_table_is_available_or_says_why_not() -> None:
    found = availability()
    assert [name for name, _, _ in found] == list(BACKENDS)
    assert all(bool(version) is not bool(missing) for _, version, missing in found)
