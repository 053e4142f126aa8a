"""A network in int8: which backend it is made for, when it is refused, and when fp32 is served instead."""

# TorchScript reads the annotations of `forward`, and takes what has none for a tensor.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pyserve.archive.archive import open_archive
from pyserve.backends.kept import Made
from pyserve.backends.table import AOTINDUCTOR, BACKENDS, OPENVINO
from pyserve.errors import ModelLoadError
from pyserve.lanes.native import NativeLane
from pyserve.lanes.network import Network
from pyserve.models import backend_network, int8_network
from pyserve.models.backend_network import Split
from pyserve.models.loader import load_network
from pyserve.models.model import Model
from tests.support.networks import Affine
from tests.support.other_backend import OtherModel
from tests.support.serving_models import write_torchscript

INPUT = {"input": {"dtype": "float32", "shape": [16]}, "precision": "int8"}
GOOD = {"items": 4, "top1": 1.0, "similarity": 0.9999, "largest": 0.01234, "mean": 0.001}


def loaded(store: Path, *, width: int = 16, name: str = "a.npy", **config: Any) -> Network:
    """The archive's only calibration file holds rows of ``width`` numbers."""
    folder = store / "inputs"
    folder.mkdir()
    np.save(folder / "a.npy", np.ones((4, width), dtype=np.float32))
    (folder / "a.npy").rename(folder / name)
    path = write_torchscript(store, Affine(), "m", config=INPUT | config, calibration=folder)
    with open_archive(path) as archive:
        return load_network(
            archive, name="m", devices=["cpu"], batch_size=4, cpu_budget=2, limit_max_image_pixels=True,
            startup_timeout_s=60, progress=lambda text: None,
        )  # fmt: skip


@pytest.fixture
def making(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What making gives of each backend, what it answers, and which were asked for."""
    given: dict[str, Any] = {
        OPENVINO: {"agreement": GOOD}, AOTINDUCTOR: {"agreement": GOOD}, "asked": [], "change": lambda answer: answer,
    }  # fmt: skip

    class FakeMaking:
        def __init__(
            self, archive: Any, backends: Sequence[str], precision: str, batch_size_max: int, *, nice: int,
            is_over: Callable[[], bool],
        ):  # fmt: skip
            assert (precision, batch_size_max, nice, is_over()) == ("int8", 4, 0, False)
            (self._backend,) = backends
            given["asked"].append(self._backend)

        def wait(self, progress: Callable[[str], None], timeout_s: float) -> list[Made]:
            return [Made(self._backend, "int8", **given[self._backend])]

    def load(archive: Any, network: Network, made: Made, split: Split) -> Network:
        candidate = dataclasses.replace(network, torch_model=OtherModel(network.torch_model, given["change"]))
        candidate.batches = backend_network.fresh_proof(network.batches, candidate)
        return candidate

    monkeypatch.setattr(int8_network, "Making", FakeMaking)
    monkeypatch.setattr(int8_network, "load_backend", load)
    for backend in (OPENVINO, AOTINDUCTOR):  # whatever is installed here
        monkeypatch.setitem(int8_network.BACKENDS, backend, dataclasses.replace(BACKENDS[backend], missing=lambda: ""))
    monkeypatch.setattr(int8_network, "why_not", lambda backend, precision: "")
    return given


def test_openvino_is_first_and_its_agreement_is_told(making: dict[str, Any], tmp_path: Path) -> None:
    network = loaded(tmp_path)
    assert making["asked"] == [OPENVINO] and isinstance(network.torch_model, OtherModel)
    assert (network.precision, network.findings["backend"]["chosen"]) == ("int8", OPENVINO)
    assert network.findings["precisionAgreement"] == GOOD
    assert "top-1 agreement 100.0% on 4 items" in network.findings["backend"]["reason"]
    assert network.batches is not None and network.batches.size_max >= 4


def test_the_next_backend_is_made_if_the_first_cannot_be(making: dict[str, Any], tmp_path: Path) -> None:
    making[OPENVINO] = {"error": "OpenVINO cannot convert it: no rule for Spline"}
    network = loaded(tmp_path)
    assert network.findings["backend"]["chosen"] == AOTINDUCTOR
    assert "OpenVINO: OpenVINO cannot convert it: no rule for Spline" in network.findings["backend"]["reason"]


def test_one_that_is_named_is_the_only_one(making: dict[str, Any], tmp_path: Path) -> None:
    assert loaded(tmp_path, backend="aotinductor").findings["backend"]["chosen"] == AOTINDUCTOR
    assert making["asked"] == [AOTINDUCTOR]


def test_files_of_another_kind_are_named(making: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError) as caught:
        loaded(tmp_path, name="a.csv")
    assert "to calibrate with (calibration/a.csv is of no such kind): put pictures" in caught.value.message
    assert making["asked"] == []


def test_if_no_backend_can_have_it_fp32_is_served_and_says_why(making: dict[str, Any], tmp_path: Path) -> None:
    making[OPENVINO] = making[AOTINDUCTOR] = {"error": "it is not installed: pip install it"}
    network = loaded(tmp_path)
    plain = torch.rand(1, 16)
    with torch.no_grad():
        assert torch.equal(network.run([plain]), Affine()(plain))
    assert network.precision == "fp32" and network.findings["backend"]["chosen"] == "torchscript"
    text = network.findings["precision"]
    assert text == network.findings["backend"]["reason"]
    assert "OpenVINO: it is not installed: pip install it; AOTInductor: it is" in text and text.endswith(
        "served in fp32"
    )


@pytest.mark.parametrize(("top1", "least", "is_served"), [(0.98, None, False), (0.98, 0.97, True), (0.97, 0.97, True)])
def test_too_little_agreement_fails_the_load(
    making: dict[str, Any], tmp_path: Path, top1: float, least: float | None, is_served: bool
) -> None:
    making[OPENVINO] = {"agreement": GOOD | {"top1": top1}}
    config = {} if least is None else {"precisionAgreementMin": least}
    if is_served:
        assert loaded(tmp_path, **config).precision == "int8"
        return
    with pytest.raises(ModelLoadError, match=r"98\.0% .* less than precisionAgreementMin \(99%\)"):
        loaded(tmp_path, **config)
    assert making["asked"] == [OPENVINO], "another backend's int8 is no other int8"


def test_neighbours_of_a_nan_are_answered_in_fp32_which_is_no_fault(making: dict[str, Any], tmp_path: Path) -> None:
    """A batch with NaN goes to the plain TorchScript as a whole."""
    making["change"] = lambda answer: answer if bool(answer.isnan().any()) else answer * 1.2
    network = loaded(tmp_path)
    assert network.precision == "int8" and network.batches is not None and network.batches.size_max >= 4


def test_answers_of_another_shape_are_not_served(making: dict[str, Any], tmp_path: Path) -> None:
    making["change"] = lambda answer: answer[:, :1]
    assert "it answers in another way" in loaded(tmp_path).findings["precision"]


def test_answers_that_depend_on_the_batch_are_not_served(making: dict[str, Any], tmp_path: Path) -> None:
    making["change"] = lambda answer: answer + answer.flip(0)
    assert loaded(tmp_path).precision == "fp32"


def test_without_files_it_is_refused_before_anything_is_made(making: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="needs inputs to calibrate with"):
        loaded(tmp_path, name="a.numbers")
    assert not making["asked"]


def test_files_that_cannot_be_used_are_named(making: dict[str, Any], tmp_path: Path) -> None:
    making[OPENVINO] = {"error": "it failed"}
    with pytest.raises(ModelLoadError, match=r"calibration/a\.npy: the input has shape \[15\], and one item is \[16\]"):
        loaded(tmp_path, width=15)
    assert making["asked"] == [OPENVINO]


def test_torchscript_has_no_int8(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="'backend: torchscript': TorchScript has no int8"):
        loaded(tmp_path, backend="torchscript")


def test_an_accelerator_has_no_int8(tmp_path: Path) -> None:
    with open_archive(write_torchscript(tmp_path, Affine(), "m", config=INPUT)) as archive:
        with pytest.raises(ModelLoadError, match=r"'precision: int8' is for CPUs, and it is to run on cuda:0"):
            int8_network.refuse_off_cpu(archive, ["cuda:0"])
        int8_network.refuse_off_cpu(archive, ["cpu"])


def test_a_model_says_the_precision_that_it_runs_at() -> None:
    model, lane = object.__new__(Model), object.__new__(NativeLane)
    model.archive = SimpleNamespace(config=SimpleNamespace(precision="int8"))  # type: ignore[assignment]
    lane.network = SimpleNamespace(precision="fp32")  # type: ignore[assignment]
    model._lane = None
    assert model.precision == "int8"
    model._lane = lane
    assert model.precision == "fp32"
