"""What a model may be packed as: each kind answers right in the native lane, or says where it runs and why."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyserve.archive.archive import Archive, open_archive
from pyserve.archive.packing import ArchiverConfig, write_archive
from pyserve.conversion.record import NeedsPythonError, python_reason
from pyserve.conversion.torchscript import needs_tracing
from pyserve.errors import ModelLoadError
from pyserve.lanes.network import Network
from pyserve.models.loader import load_network
from pyserve.proof import package_machine
from tests.support.packing import EAGER
from tests.support.safetensors import save_safetensors

FOUR = "input: {dtype: float32, shape: [4]}\n"
Dim = torch.export.Dim
Packed = Callable[..., Archive]


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x)


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packed:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))

    def make(weights: Path, config: str = FOUR, model_code: str = "") -> Archive:
        (tmp_path / "model-config.yaml").write_text(config)
        (tmp_path / "model.py").write_text(model_code)
        return open_archive(write_archive(ArchiverConfig(
            "m", "tensor", serialized_file=str(weights), config_file=str(tmp_path / "model-config.yaml"),
            model_file=str(tmp_path / "model.py") if model_code else None, export_path=str(tmp_path), force=True,
        )))  # fmt: skip

    return make


def loaded(archive: Archive, batch_size: int = 4) -> Network:
    with archive:
        return load_network(
            archive, name="m", devices=["cpu"], batch_size=batch_size, cpu_budget=1, limit_max_image_pixels=True,
            startup_timeout_s=120, progress=lambda text: None,
        )  # fmt: skip


def exported(folder: Path, shapes: Any, rows: int = 2) -> Path:
    program = torch.export.export(Linear().eval(), (torch.ones(rows, 4),), dynamic_shapes=shapes)
    torch.export.save(program, str(folder / "model.pt2"))
    return folder / "model.pt2"


def assert_right(network: Network, rows: int = 3) -> None:
    x = torch.randn(rows, 4)
    torch.testing.assert_close(network.torch_model.run([x]), Linear()(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_exported_program_runs_in_the_engine(packed: Packed, tmp_path: Path) -> None:
    network = loaded(packed(exported(tmp_path, ({0: Dim("batch")},))))
    assert_right(network)
    assert network.findings["conversion"].startswith("exported: it is the graph of the exported program")
    [(name, dtype, sizes)] = network.rules
    assert (name, dtype, sizes) == ("input", torch.float32, [(4, 4, "")])
    assert network.batches is not None
    network.batches.extend(4)
    assert (network.batches.size_max, network.batches.note) == (4, "")


@pytest.mark.slow
def test_one_exported_for_one_item_gets_them_one_by_one(packed: Packed, tmp_path: Path) -> None:
    network = loaded(packed(exported(tmp_path, None, rows=1)))
    assert_right(network, rows=1)
    assert network.batches is not None and network.batches.size_max == 1
    assert network.batches.note == "the program takes batches of at most 1"


def test_one_exported_for_other_batches_runs_in_worker_processes(packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(NeedsPythonError, match="was exported for batches of 4"):
        loaded(packed(exported(tmp_path, None, rows=4)))


@pytest.mark.slow
def test_safetensors_with_a_model_file_run_in_the_engine(packed: Packed, tmp_path: Path) -> None:
    weights = save_safetensors(Linear().state_dict(), tmp_path / "w.safetensors")
    network = loaded(packed(weights, model_code=EAGER))
    assert_right(network)
    assert network.findings["conversion"].startswith("traced")


def test_safetensors_alone_say_what_is_missing(packed: Packed, tmp_path: Path) -> None:
    weights = save_safetensors(Linear().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ModelLoadError, match=r"m\.mar: w\.safetensors holds weights only; pack .* --model-file"):
        loaded(packed(weights))


@pytest.mark.parametrize(
    ("pt2", "reason"),
    [
        ("inductor", r"'pt2' in model-config\.yaml asks for torch\.compile \(inductor\)"),
        ("{compile: {enable: true, backend: eager}}", r"asks for torch\.compile \(eager\)"),
        ("{bakend: inductor}", "'bakend', which torch.compile does not know, did you mean 'backend'"),
    ],
)
def test_pt2_of_an_eager_model_is_obeyed_in_worker_processes(
    packed: Packed, tmp_path: Path, pt2: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(Linear().state_dict(), tmp_path / "w.pth")
    archive = packed(tmp_path / "w.pth", f"{FOUR}pt2: {pt2}\n", EAGER)
    assert not needs_tracing(archive)
    with pytest.raises(NeedsPythonError, match=reason):
        loaded(archive)
    assert "is followed in its place" not in caplog.text


def test_pt2_that_asks_for_nothing_changes_nothing(packed: Packed, tmp_path: Path) -> None:
    torch.save(Linear().state_dict(), tmp_path / "w.pth")
    with packed(tmp_path / "w.pth", f"{FOUR}pt2: {{compile: {{enable: false}}}}\n", EAGER) as archive:
        assert needs_tracing(archive) and python_reason(archive) == ""


def test_pt2_of_a_model_that_is_not_eager_is_said_to_change_nothing(
    packed: Packed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.jit.save(torch.jit.script(Linear()), str(tmp_path / "model.pt"))
    network = loaded(packed(tmp_path / "model.pt", f"{FOUR}pt2: inductor\n"))
    assert_right(network)
    assert network.findings["pt2"].endswith("which compiles eager models; this one runs as it is")
    assert network.findings["pt2"] in caplog.text


@pytest.mark.slow
def test_a_backend_that_is_named_goes_before_pt2(packed: Packed, tmp_path: Path) -> None:
    torch.save(Linear().state_dict(), tmp_path / "w.pth")
    archive = packed(tmp_path / "w.pth", f"{FOUR}pt2: inductor\nbackend: torchscript\n", EAGER)
    network = loaded(archive)
    assert_right(network)
    assert network.findings["pt2"].endswith("'backend: torchscript' there is followed in its place")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pt2", ".safetensors", ".ts"])
@pytest.mark.parametrize("data", [b"PK nonsense", b"\x80\x02nonsense", b"not a model", b"\0" * 64, b'{"a": 1}'])
def test_files_of_no_kind_are_refused_by_name(packed: Packed, tmp_path: Path, suffix: str, data: bytes) -> None:
    (tmp_path / f"model{suffix}").write_bytes(data)
    with pytest.raises(ModelLoadError) as caught:
        loaded(packed(tmp_path / f"model{suffix}"))
    assert not isinstance(caught.value, NeedsPythonError)
    assert "m.mar" in caught.value.message or f"model{suffix}" in caught.value.message
    assert str(tmp_path) not in caught.value.message


METADATA = "model/data/aotinductor/model/abc.wrapper_metadata.json"


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"AOTI_CPU_ISA": "AVX512 AMX_TILE"}, r"m\.mar: model\.pt2 was compiled for a CPU with .*amx_tile"),
        ({"AOTI_MACHINE": "vax"}, r"m\.mar: model\.pt2 was compiled for vax, and this machine is "),
        ({"AOTI_PLATFORM": "win32"}, r"was compiled for win32, and this machine is linux; compile it again"),
        ({"AOTI_DEVICE_KEY": "cuda"}, r"was compiled for cuda, but this server has no accelerator"),
        ({}, r"does not hold the source of its one program"),
    ],
)
def test_a_package_of_another_machine_is_not_loaded(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str], text: str
) -> None:
    monkeypatch.setitem(package_machine._INSTRUCTIONS, "amx_tile", lambda: False)
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as file:
        file.writestr(METADATA, json.dumps(metadata))
    with pytest.raises(ModelLoadError, match=text):
        loaded(packed(tmp_path / "model.pt2"))


@pytest.mark.slow
@pytest.mark.compiles
def test_a_package_of_another_torch_is_named_with_this_one(packed: Packed, tmp_path: Path) -> None:
    """What its code calls is not there by that name."""
    program = torch.export.export(Linear().eval(), (torch.rand(3, 4),), dynamic_shapes=({0: torch.export.Dim("b")},))
    own, other = tmp_path / "own.pt2", tmp_path / "model.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(own))
    with zipfile.ZipFile(own) as before, zipfile.ZipFile(other, "w") as after:
        for each in before.infolist():
            data = before.read(each)
            after.writestr(
                each.filename, data.replace(b"aoti_torch_", b"aoti_other_") if ".so" in each.filename else data
            )
    with pytest.raises(ModelLoadError) as caught:
        loaded(packed(other))
    text = caught.value.message
    assert text.startswith("m.mar: its weights cannot be loaded: ") and "undefined symbol: aoti_other_" in text
    assert text.endswith(f"Compile it again with this torch ({torch.__version__}) on this kind of machine")
