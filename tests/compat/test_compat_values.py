"""What the shims do, beside what TorchServe's own modules did with the same snippets (`tests/compat/values`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pyserve

ROOT = Path(__file__).parent.parent.parent
VALUES = Path(__file__).parent / "values"
RECORDED: dict[str, dict[str, Any]] = json.loads((ROOT / "tests/golden/torchserve/compat_values.json").read_text())

# Where another answer is right, and why.
KINDER = "TorchServe fails on it"
CLEARER = "the error says what is wrong; TorchServe's is of Python's own kind"
WHOLE = "what cannot work is refused where it is written"
OTHER: dict[str, dict[str, str]] = {
    "archiver": {
        "command, LSP": KINDER,
        "command, bad config": "no server can read it",
        "command, extra file of the same name": "one of the two would be lost",
        "command, extra files, spaces and empty parts": KINDER,
        "command, folder that is not there": KINDER,
        "command, handler with function": KINDER,
        "command, manifest": "archiverVersion is that of the layout",
        "command, versions": "an empty version cannot be asked for",
        "config of part of a namespace": KINDER,
        "config without version": KINDER,
        "from Python, folder that is not there": KINDER,
        "from Python, manifest": "archiverVersion is that of the layout",
    },
    "context": {
        "attributes": "some of them are properties there",
        "equal": "each worker has one, which is equal to itself only",
        "no yaml": "a dict, which handlers ask with get; there None, or a dict",
        "processor": "DEVIATIONS.md: any case of a header's name",
        "properties set": KINDER,
        "too few": KINDER,
    },
    "envelopes": {
        "json, a tensor out": CLEARER,
        "json, bytearray": KINDER,
        "json, bytes": KINDER,
        "json, describes": KINDER,
        "json, empty": KINDER,
        "json, no list": CLEARER,
        "json, none": CLEARER,
        "json, text": CLEARER,
        "kserve, none": "400 rather than a handler called with None",
        "kserve, two rows": "DEVIATIONS.md: any batch size",
        "kservev2, none": CLEARER,
        "kservev2, tensors out": KINDER,
        "kservev2, wrong shape": CLEARER,
    },
    "handler_utils": {
        "micro batches, no size": WHOLE,
        "micro batches, no threads": WHOLE,
        "micro batches, unknown stage": WHOLE,
        "timed, keeps the name": "a method keeps its name",
        "timed, no config": KINDER,
        "tokens, a function": "None cannot be called",
        "tokens, bad name": "None cannot be called",
    },
    "metrics": {
        "MetricsStore": "labels that add_metric is given are kept",
        "CachingMetric, str": "the class is pyserve's own",
        "emit, a declared one with other dimensions": "there it is dropped",
        "emit, dimensions None": KINDER,
        "emit, error with text": KINDER,
        "emit, metric without unit": KINDER,
        "emit, size as a histogram": "there it is dropped, since its labels are not those declared",
        "error, no text": KINDER,
    },
    "mock_context": {"copy_files, folders as text": KINDER},
    "service": {
        "data": "the class is pyserve's own",
        "loader, built in": CLEARER,
    },
    "util": {
        "labels, no name": CLEARER,
        "map, a class too many": "a class without a label goes by its number",
        "map, a tensor of classes": KINDER,
        "map, classes that are no integers": KINDER,
        "map, empty mapping": "a class without a label goes by its number",
        "map, no rows": KINDER,
        "map, number keys": "a class without a label goes by its number",
    },
    "wire": {"intermediate, no connection": CLEARER},
}


@pytest.fixture(scope="module")
def ours() -> dict[str, dict[str, Any]]:
    """The snippets, evaluated with the shims."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/differential/compat_values.py"), str(VALUES)],
        env={**os.environ, "PYTHONPATH": f"{Path(pyserve.__file__).parent / 'compat'}{os.pathsep}{ROOT}"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return facts


def difference(recorded: dict[str, Any], found: dict[str, Any]) -> str:
    """In words; empty if there is none. An error may be of a derived class, and says what it likes."""
    if recorded.get("value") != found.get("value"):
        return f"value {found.get('value')} rather than {recorded.get('value')}"
    if recorded.get("printed", "") != found.get("printed", ""):
        return f"prints {found.get('printed')!r} rather than {recorded.get('printed')!r}"
    if [each[0] for each in recorded.get("warned", [])] != [each[0] for each in found.get("warned", [])]:
        return f"warns {found.get('warned')} rather than {recorded.get('warned')}"
    raised, raises = recorded.get("raises", []), found.get("raises", [])
    if raised[:1] != raises[:1] and not set(raised[:1]) & set(raises):
        return f"raises {raises[:1] or 'nothing'} rather than {raised[:1] or 'nothing'}"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("group", sorted(RECORDED))
def test_each_snippet_comes_to_what_it_does_there(ours: dict[str, dict[str, Any]], group: str) -> None:
    assert ours[group].keys() == RECORDED[group].keys()
    found = {name: difference(RECORDED[group][name], ours[group][name]) for name in RECORDED[group]}
    told = {name: text for name, text in found.items() if text}
    assert {name: text for name, text in told.items() if name not in OTHER.get(group, {})} == {}
    assert sorted(set(OTHER.get(group, {})) - told.keys()) == [], "these are not different any more"
