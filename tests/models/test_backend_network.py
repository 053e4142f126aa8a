"""A network that goes to another backend, or stays where it is: with real TorchScript, and others that are made up."""

# TorchScript reads the annotations of `forward`, and takes what has none for a tensor.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import dataclasses
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyserve.archive.archive import open_archive
from pyserve.backends.kept import Made, digests_of, draft, keep, main_file, read_made
from pyserve.errors import ModelLoadError
from pyserve.lanes.network import Network
from pyserve.models import backend_network
from pyserve.models.backend_network import Split, conservative_reason, input_rules, load_backend, prove_backend
from pyserve.models.loader import load_network
from pyserve.proof.package_rules import Dimension, Program, ProgramInput
from pyserve.proof.probe_inputs import InputDomain
from tests.support.networks import Affine
from tests.support.other_backend import OtherModel
from tests.support.serving_models import write_torchscript

INPUT = {"input": {"dtype": "float32", "shape": [16]}}


def loaded(
    store: Path, module: nn.Module, *, batch_size: int = 4, server: str = "torchscript", **config: Any
) -> Network:
    path = write_torchscript(store, module, "m", config=INPUT | config)
    with open_archive(path) as archive:
        return load_network(
            archive, name="m", devices=["cpu"], batch_size=batch_size, cpu_budget=2, limit_max_image_pixels=True,
            startup_timeout_s=60, progress=lambda text: None, backend=server,
        )  # fmt: skip


@pytest.fixture
def making(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What making gives, and the change that the other backend makes of answers; ``asked`` is what was made."""
    given: dict[str, Any] = {
        "error": "", "is_late": False, "change": lambda answer: answer, "asked": [], "model": OtherModel,
    }  # fmt: skip

    class FakeMaking:
        is_late = False

        def __init__(
            self, archive: Any, backends: Sequence[str], precision: str, batch_size_max: int, *, nice: int,
            is_over: Callable[[], bool],
        ):  # fmt: skip
            assert nice == 0  # somebody waits for it
            assert not is_over()
            given["asked"] = [*backends, precision, batch_size_max]

        def each(self, progress: Callable[[str], None], timeout_s: float, *, continues: bool) -> Iterator[Made]:
            progress("making")
            self.is_late = given["is_late"]
            assert continues  # behind the requests
            if not self.is_late:
                yield Made("openvino", "fp32", error=given["error"])

        def give_way(self) -> None:
            given["gave way"] = self

        def stop(self) -> None:
            given["stopped"] = self

    def load(archive: Any, network: Network, made: Made, split: Split) -> Network:
        if made.error:
            raise ModelLoadError(made.error)
        model = given["model"](network.torch_model, given["change"])
        candidate = dataclasses.replace(network, torch_model=model, findings={})
        candidate.batches = backend_network.fresh_proof(network.batches, candidate)
        return candidate

    monkeypatch.setattr(backend_network, "Making", FakeMaking)
    monkeypatch.setattr(backend_network, "load_backend", load)
    monkeypatch.setitem(
        backend_network.BACKENDS,
        "openvino",
        dataclasses.replace(backend_network.BACKENDS["openvino"], missing=lambda: ""),
    )
    return given


# --- a backend that is named ------------------------------------------------------------------------------------------


def test_a_named_backend_that_agrees_is_used(tmp_path: Path, making: dict[str, Any]) -> None:
    network = loaded(tmp_path, Affine(), server="openvino")
    assert network.torch_model.backend == "openvino"
    assert making["asked"] == ["openvino", "fp32", 4]
    found = network.findings["backend"]
    assert (found["chosen"], found["state"]) == ("openvino", "settled")
    assert found["tried"][0]["difference"] == 0.0 and found["tried"][0]["probes"] > 10
    assert network.batches is not None and network.batches.size_max == 4


def test_the_models_own_word_goes_before_the_servers(tmp_path: Path, making: dict[str, Any]) -> None:
    network = loaded(tmp_path, Affine(), server="torchscript", backend="openvino")
    assert network.torch_model.backend == "openvino"
    network = loaded(tmp_path / "other", Affine(), server="openvino", backend="torchscript")
    assert network.findings["backend"] == {
        "chosen": "torchscript", "state": "settled", "reason": "as 'backend: torchscript' says",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda answer: answer * 1.001,
            "default_backend=openvino cannot be followed: OpenVINO gives other answers: its answer differs",
        ),
        (lambda answer: answer.double(), "other dtypes"),
        (lambda answer: answer if answer.shape[0] < 4 else answer.flip(0), "is of no use: depends on the batch"),
    ],
)
def test_one_that_answers_otherwise_is_left_out(
    change: Callable[[Any], Any], said: str, tmp_path: Path, making: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    making["change"] = change
    network = loaded(tmp_path, Affine(), server="openvino")
    assert not isinstance(network.torch_model, OtherModel)
    assert network.findings["backend"]["chosen"] == "torchscript"
    assert said in network.findings["backend"]["reason"] and said in caplog.text
    assert torch.allclose(network.run([torch.ones(1, 16)]), Affine()(torch.ones(1, 16)), atol=1e-5)


def test_of_one_that_is_left_out_no_weights_stay(tmp_path: Path, making: dict[str, Any]) -> None:
    made: list[weakref.ref[OtherModel]] = []

    def change(answer: Any) -> Any:
        raise RuntimeError("it has no kernel for that")

    class Noted(OtherModel):
        def __init__(self, plain: Any, change: Callable[[Any], Any]):
            super().__init__(plain, change)
            made.append(weakref.ref(self))

    making["change"], making["model"] = change, Noted
    gc.disable()  # which a server does for long, too
    try:
        network = loaded(tmp_path, Affine(), server="openvino")
    finally:
        gc.enable()
    assert network.findings["backend"]["chosen"] == "torchscript"
    assert made and made[0]() is None


def test_one_that_leaves_ordinary_requests_to_torchscript_is_left_out(
    tmp_path: Path, making: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = itertools.count()
    monkeypatch.setattr(OtherModel, "plain_runs", property(lambda model: next(runs)))
    network = loaded(tmp_path, Affine(), server="openvino")
    assert "it leaves a batch of 1 to TorchScript" in network.findings["backend"]["reason"]


def test_one_that_cannot_be_made_is_left_out_with_the_makers_reason(tmp_path: Path, making: dict[str, Any]) -> None:
    making["error"] = "export failed: it counts its words"
    network = loaded(tmp_path, Affine(), server="openvino")
    assert "export failed: it counts its words" in network.findings["backend"]["reason"]


def test_one_that_is_not_made_in_time_is_left_to_be_made_behind_the_requests(
    tmp_path: Path, making: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    making["is_late"] = True
    network = loaded(tmp_path, Affine(), backend="openvino")
    found = network.findings["backend"]
    assert (found["chosen"], found["state"]) == ("torchscript", "making")
    said = "'backend: openvino' says, takes longer than startup_timeout=60 s; it is made behind the requests"
    assert said in found["reason"] and said in caplog.text
    assert network.making is making["gave way"]  # what was begun continues
    assert torch.allclose(network.run([torch.ones(1, 16)]), Affine()(torch.ones(1, 16)), atol=1e-5)
    network.release()  # a model that goes before it serves
    assert making["stopped"] is network.making


def test_one_that_is_not_installed_is_left_out_with_what_to_install(
    tmp_path: Path, making: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = backend_network.BACKENDS["openvino"]
    missing = "OpenVINO is not installed here; pip install openvino nncf"
    monkeypatch.setitem(backend_network.BACKENDS, "openvino", dataclasses.replace(row, missing=lambda: missing))
    network = loaded(tmp_path, Affine(), server="openvino")
    assert network.findings["backend"]["reason"] == f"default_backend=openvino cannot be followed: {missing}"
    assert making["asked"] == []


# --- what stays where it is -------------------------------------------------------------------------------------------


class DrawsNumbers(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x) * 1e-3


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x):
        self.n += 1
        return x + self.n


class LooksAtOthers(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (DrawsNumbers, "it answers one question in two ways, apart by"),
        (Counts, "it keeps state: forward"),
        (LooksAtOthers, "its answers depend on the batch"),
    ],
)
def test_a_model_whose_answers_are_not_its_inputs_alone_stays_on_torchscript(
    module: type[nn.Module], said: str, tmp_path: Path, making: dict[str, Any]
) -> None:
    network = loaded(tmp_path, module(), server="openvino")
    assert network.findings["backend"]["chosen"] == "torchscript"
    assert said in network.findings["backend"]["reason"]
    assert making["asked"] == [], "nothing is made that is not used"
    assert said in conservative_reason(network, 4)


def test_batches_that_may_depend_on_each_other_by_order_are_looked_at_too(tmp_path: Path) -> None:
    network = loaded(tmp_path, LooksAtOthers(), batchDependent="allowed")
    assert conservative_reason(network, 4) == "it answers an item otherwise beside other items than beside copies of it"
    assert conservative_reason(network, 1) == "", "alone it always answers the same"


def test_a_plain_model_need_not_stay(tmp_path: Path) -> None:
    network = loaded(tmp_path, Affine())
    assert conservative_reason(network, 4) == ""


# --- what a backend is told -------------------------------------------------------------------------------------------


def test_rules_say_what_was_shown(tmp_path: Path) -> None:
    network = loaded(tmp_path, Affine())
    assert input_rules(network) == [("input 1", torch.float32, [(16, 16, "")])]
    words = InputDomain(torch.int64, ((1, 64), (3, 3), (1, None)), same=("length", "width"))
    network = dataclasses.replace(network, domains=[words])
    ((_, dtype, sizes),) = input_rules(network)
    assert (dtype, sizes) == (torch.int64, [(1, 64, "size_length"), (3, 3, ""), (1, 512, "size_width")])
    unnamed = InputDomain(torch.float32, ((2, None), (4, 4)))
    network = dataclasses.replace(network, domains=[unnamed, unnamed])
    first, second = input_rules(network)
    assert first[2] == second[2] == [(2, 512, "size_0"), (4, 4, "")], "as export_inputs ties them"
    first, second = input_rules(network, made=(((3, 30), (4, 4)), ((1, None), (4, 4))))
    assert (first[2][0], second[2][0]) == ((3, 30, "size_0"), (2, 512, "size_0")), "what the program was proven for"


def test_rules_of_a_package_are_what_its_source_says_too(tmp_path: Path) -> None:
    network = dataclasses.replace(
        loaded(tmp_path, Affine()), domains=[InputDomain(torch.float32, ((1, None), (1, 64)))]
    )
    sizes = (Dimension(1, None, "s0"), Dimension(2, 4096, "s1"), Dimension(8, 32, "s2"))
    program = Program((ProgramInput(torch.float32, sizes),), 1, None)
    assert input_rules(network, program) == [("input 1", torch.float32, [(2, 4096, "size_0"), (8, 32, "size_1")])]


def test_what_could_not_be_made_cannot_be_loaded(tmp_path: Path) -> None:
    network = loaded(tmp_path, Affine())
    with open_archive(tmp_path / "m.mar") as archive, pytest.raises(ModelLoadError, match="no compiler"):
        load_backend(archive, network, Made("aotinductor", "fp32", error="no compiler"), Split())


def test_what_was_damaged_since_it_was_made_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    network = loaded(tmp_path, Affine())
    with open_archive(tmp_path / "m.mar") as archive:
        with draft(archive, "aotinductor", "fp32") as folder:
            (folder / "package.pt2").write_bytes(b"0" * 100)
            made = Made("aotinductor", "fp32", size=100, digests=digests_of(folder))
            keep(archive, made, folder)
        main_file(archive, "aotinductor", "fp32").write_bytes(b"0" * 50 + bytes(50))
        with pytest.raises(ModelLoadError, match=r"^package\.pt2 in .* was changed or damaged since it was "):
            load_backend(archive, network, made, Split())
        assert read_made(archive, "aotinductor", "fp32") is None, "it is made again"


def test_batches_are_shown_as_far_as_torchscripts(tmp_path: Path) -> None:
    network = loaded(tmp_path, Affine(), batch_size=8)
    candidate = dataclasses.replace(network, torch_model=OtherModel(network.torch_model))
    candidate.batches = backend_network.fresh_proof(network.batches, candidate)
    assert candidate.batches is not None and candidate.batches.size_max == 1
    assert prove_backend(network, candidate, 8) == ""
    assert candidate.batches.size_max == 8


@pytest.mark.parametrize(("workers", "budget", "threads"), [(1, 2, 2), (2, 2, 1), (4, 2, 1), (0, 2, 2), (3, 8, 2)])
def test_workers_and_threads_stay_within_the_budget(workers: int, budget: int, threads: int) -> None:
    split = Split.of(workers, budget)
    assert split.threads == threads and split.runners_max == budget


class Overflows(nn.Module):
    """Its answer is 0; of numbers whose seventh power is none in fp32 it is NaN."""

    def forward(self, x):
        y = x * x * x * x * x * x * x
        return torch.relu(y - y)


def test_one_that_hides_what_overflows_within_the_model_is_left_out(
    tmp_path: Path, making: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(model: Any, inputs: Sequence[torch.Tensor]) -> Any:
        answer = model._plain.run(list(inputs))
        # As the engine has it: other numbers are left to TorchScript.
        return answer.nan_to_num() if all(bool((each.abs() <= 1e6).all()) for each in inputs) else answer

    monkeypatch.setattr(OtherModel, "run", run)
    network = loaded(tmp_path, Overflows(), server="openvino")
    assert network.findings["backend"]["chosen"] == "torchscript"
    assert "numbers of about 1e6 overflow" in network.findings["backend"]["reason"]


class OnlyOne(nn.Module):
    def forward(self, x):
        return x.view(1, 16) * 2


def test_a_model_of_one_item_at_a_time_is_served_even_so(tmp_path: Path, making: dict[str, Any]) -> None:
    network = loaded(tmp_path, OnlyOne(), server="openvino", batch_size=1)
    assert network.findings["backend"]["chosen"] == "torchscript"
    assert "a batch of 2 fails: shape '[1, 16]' is invalid" in network.findings["backend"]["reason"]
