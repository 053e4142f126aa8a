"""Networks around one operator each, on a named backend: refused with a reason, or answered as eager torch does.

`pytest -m nightly tests/backends/test_operators.py`; each network is made in a process of its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.archive.archive import open_archive
from pyserve.backends import openvino
from pyserve.conversion.record import NeedsPythonError
from pyserve.lanes.network import Network
from pyserve.models.loader import load_network
from pyserve.proof.comparison import difference, dtypes, rows
from tests.support.operator_networks import COMPILED, NETWORKS, Operator
from tests.support.packing import pack
from tests.support.random_comparison import leaves_of

pytestmark = pytest.mark.nightly

BATCH_SIZE = 8
TOLERANCE = 1e-4
# OpenVINO's activations are polynomials: softplus and mish of -15, which are nearly nothing, are off by so much.
ABSOLUTE = 2e-6
# How far a step of fp32 on each number of the input may move what torch itself answers, times this one.
STEPS = 16


@pytest.mark.skipif(bool(openvino.missing()), reason=openvino.missing())
@pytest.mark.parametrize("name", NETWORKS)
def test_openvino_answers_as_torch_or_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    print(outcome(tmp_path, NETWORKS[name], "openvino"))  # which -rP shows


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_aotinductor_answers_as_torch_or_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    print(outcome(tmp_path, NETWORKS[name], "aotinductor"))


def outcome(folder: Path, operator: Operator, backend: str) -> str:
    """Why the backend is refused, or how many of the batches it has answered itself. Fails for a wrong answer."""
    try:
        network = load(folder, operator, backend)
    except NeedsPythonError as error:  # such as outputs that have not one entry per item
        return f"in worker processes: {error.message}"
    if network.torch_model.backend != backend:
        reason = network.findings["backend"]["reason"]
        assert reason
        return f"refused: {reason}"
    eager = operator.network()
    own = count = 0
    for label, x in operator.inputs():
        count += 1
        before = network.torch_model.plain_runs
        got = network.run([x.clone()])
        if network.torch_model.plain_runs != before:
            continue
        own += 1
        with torch.no_grad():
            expected = eager(x.clone())
        assert dtypes(expected) == dtypes(got), f"{label}: {dtypes(got)} instead of {dtypes(expected)}"
        for row in range(len(x)):
            wanted, given = rows(expected, row, 1), rows(got, row, 1)
            off = difference(wanted, given)
            is_right = off <= TOLERANCE or is_near(wanted, given) or off <= STEPS * by_rounding(eager, x, row)
            assert is_right, f"{label}, row {row} is off by {off:.1e}: {given} instead of {wanted}"
    return f"right, {own} of {count} by the backend itself"


def load(folder: Path, operator: Operator, backend: str) -> Network:
    config = json.dumps({"input": operator.config, "backend": backend, "batchSize": BATCH_SIZE})
    path = pack(folder, model_code=operator.source, state=operator.network().state_dict(), config=config)
    with open_archive(path) as archive:
        return load_network(
            archive, name="m", devices=["cpu"], batch_size=BATCH_SIZE, cpu_budget=1, limit_max_image_pixels=True,
            startup_timeout_s=600, progress=lambda text: None,
        )  # fmt: skip


def is_near(expected: Any, got: Any) -> bool:
    left, right = leaves_of(expected), leaves_of(got)
    return len(left) == len(right) and all(
        torch.allclose(one, other, TOLERANCE, ABSOLUTE, equal_nan=True)
        if isinstance(one, torch.Tensor) and one.is_floating_point() and one.shape == other.shape
        else difference(one, other) == 0
        for one, other in zip(left, right, strict=True)
    )


def by_rounding(eager: torch.nn.Module, x: torch.Tensor, row: int) -> float:
    """How far torch's own answer for a row moves when each number of the input does by one step of rounding."""
    if not x.is_floating_point():
        return 0.0
    with torch.no_grad():
        return difference(rows(eager(x.clone()), row, 1), rows(eager(x * (1 + 2.0**-22)), row, 1))
