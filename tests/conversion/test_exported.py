"""Programs of torch.export become TorchScript that is true to them, within the sizes that they were exported for."""

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
from pyserve.conversion.exported import exported_rules, script_exported
from pyserve.conversion.record import NeedsPythonError, conversion_of, is_converted, python_reason
from pyserve.conversion.torchscript import Tracing, check_packed, needs_tracing, traced_file
from pyserve.errors import ModelLoadError
from pyserve.handler import InputError
from pyserve.handlers.loading import load_package
from pyserve.handlers.tensor import TensorHandler
from pyserve.proof.export_rules import read_exported
from pyserve.proof.package_rules import Dimension, ProgramInput, read_program
from tests.support.contexts import context_for

Dim = torch.export.Dim
FOUR = "input: {dtype: float32, shape: [4]}\n"


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x)


class Sums(nn.Module):
    """Of any number of steps; named outputs with one within another."""

    def forward(self, x):
        return {"sum": x.sum(1), "both": (x.mean(1), x[:, -1])}


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count.add_(1)
        return x + self.count


class Halves(nn.Module):
    """Takes even sizes only, which the program says in a check of its own."""

    def forward(self, x):
        return x.view(x.shape[0], 2, -1).sum(1)


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Archive]:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))

    def make(model: nn.Module, shapes: Any, rows: int = 2, size: int = 4, config: str = FOUR) -> Archive:
        program = torch.export.export(model.eval(), (torch.ones(rows, size),), dynamic_shapes=shapes)
        torch.export.save(program, str(tmp_path / "model.pt2"))
        (tmp_path / "model-config.yaml").write_text(config)
        return open_archive(write_archive(ArchiverConfig(
            "m", "tensor", serialized_file=str(tmp_path / "model.pt2"), export_path=str(tmp_path), force=True,
            config_file=str(tmp_path / "model-config.yaml"),
        )))  # fmt: skip

    return make


def handler_of(archive: Archive) -> tuple[TensorHandler, list[torch.Tensor]]:
    handler = TensorHandler()
    context = context_for(archive.model_dir, {}, **archive.config.raw)
    handler.prepare(context)
    example = handler.example_input(context)
    return handler, [example] if isinstance(example, torch.Tensor) else list(example)


def scripted(archive: Archive) -> torch.jit.ScriptModule:
    with archive, torch.no_grad():
        handler, example = handler_of(archive)
        program, conversion = script_exported(archive, handler, example, [], freezes=True)
    assert (conversion.how, conversion.override) == ("exported", False) and conversion.probes >= 6
    return program


def test_the_sizes_of_a_program_are_read_without_loading_it(packed: Callable[..., Archive]) -> None:
    with packed(Sums(), ({0: Dim("batch"), 1: Dim("steps", min=3, max=9)},)) as archive:
        program = exported_rules(archive)
    [only] = program.inputs
    assert (only.dtype, program.rows_min, program.rows_max, program.is_compiled) == (torch.float32, 1, None, False)
    steps = only.dimensions[1]
    assert (steps.min, steps.max) == (3, 9) and steps.symbol not in ("", only.dimensions[0].symbol)


def test_its_torchscript_answers_as_the_program(packed: Callable[..., Archive]) -> None:
    program = scripted(packed(Linear(), ({0: Dim("batch")},)))
    for rows in (1, 2, 7):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(program(x), Linear()(x), rtol=1e-5, atol=1e-6)


def test_outputs_keep_their_names_and_nesting(packed: Callable[..., Archive]) -> None:
    shapes = ({0: Dim("batch"), 1: Dim("steps", min=1, max=9)},)
    program = scripted(packed(Sums(), shapes, config="input: {dtype: float32, shape: [-1]}\n"))
    x = torch.randn(3, 5)
    found = program(x)
    assert found.keys() == {"sum", "both"}
    torch.testing.assert_close(found["sum"], x.sum(1))
    torch.testing.assert_close(found["both"][1], x[:, -1])


def test_a_program_for_one_row_is_compared_with_one_row(packed: Callable[..., Archive]) -> None:
    archive = packed(Linear(), None, rows=1)
    assert exported_rules(archive).rows_max == 1
    x = torch.randn(1, 4)
    torch.testing.assert_close(scripted(archive)(x), Linear()(x), rtol=1e-5, atol=1e-6)


def test_state_is_kept_in_it(packed: Callable[..., Archive]) -> None:
    program = scripted(packed(Counts(), ({0: Dim("batch")},)))
    x = torch.zeros(1, 4)
    assert [program(x)[0, 0].item() for _ in range(3)] == [1.0, 2.0, 3.0]


def test_a_fixed_batch_goes_to_worker_processes_which_fill_up(packed: Callable[..., Archive]) -> None:
    archive = packed(Linear(), None, rows=4)
    with (
        archive,
        pytest.raises(NeedsPythonError, match=r"model\.pt2 was exported for batches of 4, and .*Dim\('batch'"),
    ):
        exported_rules(archive)
    call = load_package(archive.path.parent / "model.pt2", torch.device("cpu"))
    for rows in (1, 4, 9):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(call(x), Linear()(x), rtol=1e-5, atol=1e-6)


def test_worker_processes_refuse_what_it_was_not_exported_for(packed: Callable[..., Archive]) -> None:
    archive = packed(Sums(), ({0: Dim("batch"), 1: Dim("steps", min=3, max=9)},))
    call = load_package(archive.path.parent / "model.pt2", torch.device("cpu"))
    assert call(torch.ones(1, 5))["sum"].tolist() == [5.0]
    with pytest.raises(InputError, match="dimension 1 has size 10; the model was exported for 3 to 9"):
        call(torch.ones(1, 10))
    with pytest.raises(InputError, match="was exported for float32 with 1 dimensions, got float64"):
        call(torch.ones(1, 5).double())


def test_checks_that_torchscript_would_leave_out_are_a_reason(packed: Callable[..., Archive]) -> None:
    auto = Dim.AUTO
    archive = packed(Halves(), ({0: Dim("batch"), 1: auto},), size=6, config="input: {dtype: float32, shape: [-1]}\n")
    with (
        archive,
        torch.no_grad(),
        pytest.raises(NeedsPythonError, match=r"checks its inputs|batches of 2"),
    ):
        script_exported(archive, *handler_of(archive), [], freezes=True)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("input: {dtype: int64, shape: [4]}\n", r"input is int64, but the program was exported for float32"),
        ("input: {dtype: float32, shape: [4, 2]}\n", "has 2 dimensions without the batch, but the program was"),
        ("input: {dtype: float32, shape: [5]}\n", "is 5 in model-config.yaml, but the program was exported for 4"),
        ("input: [{name: a, dtype: float32, shape: [4]}, {name: b, dtype: float32, shape: [4]}]\n",
         "the program takes 1 inputs, model-config.yaml's 'input' describes 2"),
    ],
)  # fmt: skip
def test_a_program_that_does_not_go_with_the_configuration(
    packed: Callable[..., Archive], config: str, text: str
) -> None:
    with packed(Linear(), ({0: Dim("batch")},), config=config) as archive:
        handler, example = handler_of(archive)
        with pytest.raises(ModelLoadError, match=text):
            script_exported(archive, handler, example, [], freezes=True)


def test_a_dimension_made_of_another_is_named(tmp_path: Path) -> None:
    class Joined(nn.Module):
        def forward(self, x, y):
            return torch.cat([x, y], 1)

    steps = Dim("steps", min=1, max=16)
    shapes = ({0: Dim("batch"), 1: steps}, {0: Dim("batch"), 1: 2 * steps})
    program = torch.export.export(Joined(), (torch.ones(2, 4), torch.ones(2, 8)), dynamic_shapes=shapes)
    torch.export.save(program, str(tmp_path / "m.pt2"))
    with pytest.raises(ModelLoadError, match=r"m: dimension 1 of input 2 was exported as .*2.*which cannot be checked"):
        read_exported(tmp_path / "m.pt2", "m")


GOOD = {
    "graph_module": {
        "graph": {"tensor_values": {"x": {
            "dtype": 7, "sizes": [{"as_expr": {"expr_str": "s0"}}, {"as_int": 4}],
        }}},
        "signature": {"input_specs": [{"parameter": {}}, {"user_input": {"arg": {"as_tensor": {"name": "x"}}}}]},
    },
    "range_constraints": {"s0": {"min_val": 0, "max_val": 8}},
}  # fmt: skip


def written(folder: Path, text: str, name: str = "m/models/model.json") -> Path:
    with zipfile.ZipFile(folder / "m.pt2", "w") as file:
        file.writestr(name, text)
    return folder / "m.pt2"


@pytest.mark.parametrize("name", ["m/models/model.json", "serialized_exported_program.json"])
def test_the_text_of_a_graph_says_what_it_takes(tmp_path: Path, name: str) -> None:
    program = read_exported(written(tmp_path, json.dumps(GOOD), name), "m")
    assert program.inputs == (ProgramInput(torch.float32, (Dimension(1, 8, "s0"), Dimension(4, 4))),)
    assert (program.rows_min, program.rows_max) == (1, 8)


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ('"dtype": 7', '"dtype": 99', "a dtype that no request can hold"),
        ('"as_tensor"', '"as_int"', "input 1 of the exported program is no tensor"),
        ('"user_input"', '"buffer"', "takes no inputs"),
        ('"range_constraints"', '"ranges"', "does not say what it takes"),
        ('"s0"', '"2*s0 + 1"', "was exported as 2"),
        ("{", "[", "cannot be read as an exported program, it may be damaged"),
    ],
)
def test_a_text_that_does_not_say_it_is_refused(tmp_path: Path, before: str, after: str, text: str) -> None:
    path = written(tmp_path, json.dumps(GOOD).replace(before, after, 1))
    with pytest.raises(ModelLoadError, match=text) as caught:
        read_exported(path, "m.mar: m.pt2")
    assert caught.value.message.startswith("m.mar: m.pt2")


@pytest.mark.parametrize(("name", "read"), [("a/models/model.json", read_exported),
                                            ("a/data/aotinductor/model/x.wrapper.cpp", read_program)])  # fmt: skip
@pytest.mark.parametrize("is_encrypted", [False, True])
def test_a_zip_that_cannot_be_unpacked_is_named(tmp_path: Path, name: str, read: Any, is_encrypted: bool) -> None:
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, "".join(map(str, range(200))))
    content = bytearray(path.read_bytes())
    if is_encrypted:
        content[6] |= 1
        content[content.find(b"PK\1\2") + 8] |= 1
    else:
        at = 30 + len(name)
        content[at : at + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"m\.mar: m\.pt2.* cannot be read"):
        read(path, "m.mar: m.pt2")


@pytest.mark.slow
def test_an_archive_is_converted_in_its_own_process_and_kept(packed: Callable[..., Archive]) -> None:
    archive = packed(Linear(), ({0: Dim("batch")},))
    assert is_converted(archive) and needs_tracing(archive)
    texts: list[str] = []
    with archive:
        Tracing(archive).wait(texts.append, 120)
        assert texts == ["reading the exported program", "keeping the TorchScript"]
        assert not needs_tracing(archive)
        conversion = conversion_of(archive)
        assert conversion is not None and conversion.how == "exported" and conversion.difference < 1e-6
        x = torch.randn(3, 4)
        found = torch.jit.load(str(traced_file(archive)))(x)
        torch.testing.assert_close(found, Linear()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_why_it_runs_in_worker_processes_is_kept(packed: Callable[..., Archive]) -> None:
    archive = packed(Linear(), None, rows=4)
    assert "was exported for batches of 4" in check_packed(archive.path, lambda text: None)
    assert "was exported for batches of 4" in python_reason(archive)


@pytest.mark.slow
def test_a_damaged_program_is_named(packed: Callable[..., Archive], tmp_path: Path) -> None:
    packed(Linear(), ({0: Dim("batch")},)).close()
    with zipfile.ZipFile(tmp_path / "model.pt2") as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as file:
        for name, data in members.items():
            file.writestr(name, data[: len(data) // 2] if "weight_0" in name else data)
    broken = write_archive(ArchiverConfig(
        "n", "tensor", serialized_file=str(tmp_path / "model.pt2"), export_path=str(tmp_path),
        config_file=str(tmp_path / "model-config.yaml"),
    ))  # fmt: skip
    with pytest.raises(ModelLoadError, match=r"model\.pt2 cannot be loaded as an exported program: .*export it again"):
        check_packed(broken, lambda text: None)
