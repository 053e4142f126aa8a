"""What a lower precision costs: how agreement is counted, and what becomes of a model's numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.archive.archive import open_archive
from pyserve.backends import precision
from pyserve.backends.precision import (
    PrecisionAgreement,
    check_agreement,
    measure_agreement,
    precision_note,
    sums_overflow,
    why_not,
)
from pyserve.errors import ModelLoadError
from pyserve.models.loader import load_network
from tests.support.packing import pack

ITEMS = [(torch.tensor([[float(number), 1.0]]),) for number in (0, 2, 3, 4)]


def plain(inputs: Any) -> Any:
    return inputs[0]


def test_equal_answers_agree_entirely() -> None:
    found = measure_agreement(plain, plain, ITEMS)
    assert found == PrecisionAgreement(items=4, top1=1.0, similarity=pytest.approx(1.0), largest=0.0, mean=0.0)
    assert found.share == 1.0


def test_figures_are_those_that_their_names_say() -> None:
    """The second item's answer names another class, and is off by 2 of 2 in one of its two numbers."""
    answers = iter([ITEMS[0][0], torch.tensor([[0.0, 1.0]]), ITEMS[2][0], ITEMS[3][0]])
    found = measure_agreement(plain, lambda inputs: next(answers), ITEMS)
    assert found.top1 == 0.75 and found.share == 0.75
    assert found.largest == 1.0 and found.mean == pytest.approx(1.0 / 8)
    assert found.similarity == pytest.approx((3 + 1 / math.sqrt(5)) / 4)
    assert str(found) == "top-1 agreement 75.0% on 4 items, largest difference 1.0e+00, mean 1.2e-01 (relative)"


def test_without_scores_it_is_the_angle_that_counts() -> None:
    items = [(torch.ones(1, 2, 3),)]
    found = measure_agreement(plain, lambda inputs: -inputs[0], items)
    assert found.top1 is None and found.similarity == found.share == pytest.approx(-1.0)
    assert found.largest == 2.0


@pytest.mark.parametrize("odd", [torch.zeros(1, 3), torch.full((1, 2), math.nan), torch.full((1, 2), math.inf)])
def test_what_is_no_answer_never_agrees(odd: torch.Tensor) -> None:
    if odd.shape[1] == 3:
        with pytest.raises(ModelLoadError, match=r"of shapes \[\[1, 3\]\], fp32's of \[\[1, 2\]\]"):
            measure_agreement(plain, lambda inputs: odd, ITEMS)
        return
    found = measure_agreement(plain, lambda inputs: odd, ITEMS)
    assert found.largest == math.inf and found.similarity == 0.0


def test_answers_with_names_and_nesting_and_whole_numbers() -> None:
    def named(inputs: Any) -> Any:
        return {"b": [inputs[0]], "a": (inputs[0].long(),)}

    found = measure_agreement(named, lambda inputs: {"a": (torch.zeros(1, 2).long(),), "b": [inputs[0]]}, ITEMS)
    assert found.top1 == 1.0 and found.largest == 0.0


def test_it_is_kept_as_json_and_read_again() -> None:
    found = measure_agreement(plain, lambda inputs: inputs[0] * 1.5, ITEMS)
    assert PrecisionAgreement.from_json(found.to_json()) == found
    with pytest.raises((KeyError, TypeError, ValueError)):
        PrecisionAgreement.from_json({"items": 3})


def test_too_little_agreement_is_refused_with_the_figures() -> None:
    found = PrecisionAgreement(items=100, top1=0.97, similarity=0.999, largest=0.2, mean=0.01)
    check_agreement("m.mar", "openvino", "int8", found, 0.97)
    with pytest.raises(
        ModelLoadError, match=r"m\.mar.*precision: int8.*97\.0%.*precisionAgreementMin \(99%\)"
    ) as caught:
        check_agreement("m.mar", "openvino", "int8", found, None)
    assert "calibrat" in caught.value.message.lower() and "lower precisionAgreementMin" in caught.value.message
    check_agreement("m.mar", "openvino", "int8", PrecisionAgreement(4, None, 0.995, 0.1, 0.01), None)


def test_an_agreement_that_is_no_number_is_refused() -> None:
    with pytest.raises(ModelLoadError):
        check_agreement("m.mar", "openvino", "int8", PrecisionAgreement(4, None, math.nan, 0.1, 0.01), None)


def test_torchscript_has_no_int8_and_says_what_has() -> None:
    assert "backend: openvino" in why_not("torchscript", "int8")
    assert why_not("torchscript", "bf16") == ""


def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: None)
    assert why_not("openvino", "int8") == (
        "nncf, which makes int8 models for openvino, is not installed: pip install openvino nncf"
    )
    assert "torchao" in why_not("aotinductor", "int8") and why_not("aotinductor", "bf16") == ""


def test_notes_tell_what_the_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset({"avx2"}))
    assert "no instructions for bf16" in precision_note("openvino", "bf16")
    assert "7 bits" in precision_note("aotinductor", "int8") and sums_overflow()
    assert "many times as long" in precision_note("torchscript", "bf16")
    assert precision_note("aotinductor", "bf16") == precision_note("openvino", "fp32") == ""
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset({"avx512_vnni", "amx_bf16"}))
    assert precision_note("openvino", "bf16") == precision_note("openvino", "int8") == "" and not sums_overflow()


def test_one_that_the_cpu_lacks_is_said_when_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset({"avx2"}))
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    config = "input: {dtype: float32, shape: [4]}\nprecision: bf16\n"
    with open_archive(pack(tmp_path, network=torch.nn.Linear(4, 2), config=config)) as archive:
        network = load_network(
            archive, name="m", devices=["cpu"], batch_size=1, cpu_budget=1, limit_max_image_pixels=True,
            startup_timeout_s=600, progress=lambda text: None, backend="torchscript",
        )  # fmt: skip
    assert "no instructions for bf16" in network.findings["precision"] and "many times as long" in caplog.text
