"""What a compiled program says of its inputs, and that nothing else gets to it.

The texts in golden/packages are the lines of the sources in real packages (torch 2.13) that say so.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.errors import ModelLoadError
from pyserve.handler import InputError
from pyserve.proof.package_rules import (
    CheckedPackage,
    Dimension,
    Program,
    ProgramInput,
    check_filling,
    fitted_domains,
    fitted_example,
    is_compiled,
    out_structure,
    read_program,
)
from pyserve.proof.probe_inputs import InputDomain

GOLDEN = Path(__file__).parents[1] / "golden" / "packages"
ONE_SIZE = ((1, None),)


def package(folder: Path, source: str, name: str = "m/data/aotinductor/model/abc.wrapper.cpp") -> Path:
    path = folder / "m.pt2"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, source)
    return path


def program_of(folder: Path, name: str) -> Program:
    return read_program(package(folder, (GOLDEN / f"{name}.txt").read_text()), "m")


def test_ranges_symbols_and_dtype_of_a_dynamic_program(tmp_path: Path) -> None:
    program = program_of(tmp_path, "seq_dyn")
    assert program.inputs == (ProgramInput(torch.int64, (Dimension(2, 64, "s23"), Dimension(2, 64, "s27"))),)
    assert (program.rows_min, program.rows_max) == (1, 64)


def test_a_program_without_a_dynamic_batch_takes_its_one_size(tmp_path: Path) -> None:
    program = program_of(tmp_path, "mlp_static4")
    assert (program.rows_min, program.rows_max) == (4, 4)
    assert program.inputs[0].dimensions == (Dimension(4, 4), Dimension(64, 64))


def test_the_buffers_that_a_program_writes_to_are_named(tmp_path: Path) -> None:
    assert program_of(tmp_path, "kept_buffer").written == ("kept",)
    assert program_of(tmp_path, "mlp_static4").written == ()


def test_inputs_share_their_batch(tmp_path: Path) -> None:
    program = program_of(tmp_path, "two_dict")
    assert [each.dimensions[0].symbol for each in program.inputs] == ["s17", "s17"]
    source = (GOLDEN / "two_dict.txt").read_text().replace("arg3_1, {s17", "arg3_1, {s18")
    with pytest.raises(ModelLoadError, match="do not share their first dimension"):
        read_program(package(tmp_path, source), "m")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda source: "", "does not say what each of its inputs may be"),
        (lambda source: source.replace("input_handles, 1)", "input_handles, 2)"), "does not say"),
        (lambda source: source.replace("{s23, s27}", "{s23, 2L*s27}"), r"dimension 1 was compiled as 2\*s27"),
        (lambda source: source.replace("dtype_int64", "dtype_unheard"), "is no tensor"),
        (lambda source: source.replace("(1 != arg2_1_stride[1])", "(5 != arg2_1_stride[1])"), "not contiguous"),
    ],
)
def test_a_package_that_does_not_say_what_it_takes_is_refused(change: Any, text: str, tmp_path: Path) -> None:
    source = change((GOLDEN / "seq_dyn.txt").read_text())
    with pytest.raises(ModelLoadError, match=text):
        read_program(package(tmp_path, source), "m")


def test_a_package_without_its_source_is_refused(tmp_path: Path) -> None:
    path = package(tmp_path, "", "m/data/aotinductor/model/abc.wrapper.so")
    assert is_compiled(path)
    with pytest.raises(ModelLoadError, match="does not hold the source of its one program"):
        read_program(path, "m")
    assert not is_compiled(package(tmp_path, "", "m/models/model.json"))


def test_a_dimension_without_a_known_maximum_needs_one_in_the_configuration() -> None:
    program = Program((ProgramInput(torch.int64, (Dimension(2, None, "b"), Dimension(2, None, "s"))),), 1, None)
    with pytest.raises(ModelLoadError, match=r"dimension 1 of ids was compiled for any size.*shape: \[2\.\.512\]"):
        fitted_domains(program, [InputDomain(torch.int64, ONE_SIZE)], ["ids"], "m.mar")
    fitted = fitted_domains(program, [InputDomain(torch.int64, ((1, 128),))], ["ids"], "m.mar")
    assert fitted[0].sizes == ((2, 128),)
    assert program.rules(["ids"], fitted) == [("ids", torch.int64, [(2, 128, "s")])]


def test_what_the_program_and_the_configuration_allow_is_what_both_allow() -> None:
    program = Program((ProgramInput(torch.int64, (Dimension(2, 64, "b"), Dimension(24, 64, "s"))),), 1, 64)
    fitted = fitted_domains(program, [InputDomain(torch.int64, ((1, 32),))], ["ids"], "m.mar")
    assert fitted[0].sizes == ((24, 32),)
    [example] = fitted_example([torch.zeros(1, 16, dtype=torch.int64)], fitted)
    assert example.shape == (1, 24)
    with pytest.raises(ModelLoadError, match=r"dimension 1 of ids is 16 in model-config.yaml, but .* for 24 to 64"):
        fitted_domains(program, [InputDomain(torch.int64, ((16, 16),))], ["ids"], "m.mar")


def test_outputs_get_their_names_and_nesting_back(tmp_path: Path) -> None:
    lines = (GOLDEN / "two_dict.txt").read_text().splitlines()
    specs = [line[line.index('R"(') + 3 : line.rindex(')"')] for line in lines if "_spec_ =" in line]
    restored = out_structure(specs)
    assert restored is not None
    a, b, c, d = (torch.full((1,), float(number)) for number in range(4))
    assert restored((a, b, c, d)) == {"sum": a, "arg": b, "meta": (c, d)}
    assert out_structure([specs[0], '[1, {"type": null, "context": null, "children_spec": []}]']) is None


# --- in a worker process ----------------------------------------------------------------------------------------------


class Compiled:
    """Behaves as compiled code of a fixed batch does: it believes that it has ``count`` rows."""

    def __init__(self, count: int | None):
        self.count = count
        self.called_with: list[tuple[int, ...]] = []

    def __call__(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.called_with.append(tuple(x.shape))
        assert self.count is None or len(x) == self.count
        return {"twice": x * 2, "largest": x.max(1).values}


def checked(rows_min: int, rows_max: int | None, count: int | None) -> tuple[CheckedPackage, Compiled]:
    batch = Dimension(rows_min, rows_max)
    compiled = Compiled(count)
    program = Program((ProgramInput(torch.float32, (batch, Dimension(2, 64, "s"))),), rows_min, rows_max)
    return CheckedPackage(compiled, program), compiled


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize("compiled_for", [1, 4])
def test_batches_are_cut_or_filled_up_to_what_the_program_takes(rows: int, compiled_for: int) -> None:
    package, compiled = checked(compiled_for, compiled_for, compiled_for)
    x = torch.rand(rows, 8)
    got = package(x)
    assert torch.equal(got["twice"], x * 2)
    assert torch.equal(got["largest"], x.max(1).values)
    assert {shape[0] for shape in compiled.called_with} == {compiled_for}


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.rand(1, 65), "dimension 1 has size 65; the model was compiled for 2 to 64"),
        (torch.rand(1, 1), "dimension 1 has size 1;"),
        (torch.rand(1, 8).double(), "compiled for float32 with 1 dimensions, got float64"),
        (torch.rand(1, 8, 2), "got float32 with 2"),
    ],
)
def test_what_the_program_was_not_compiled_for_never_reaches_it(x: torch.Tensor, text: str) -> None:
    package, compiled = checked(1, 64, None)
    with pytest.raises(InputError, match=text):
        package(x)
    assert compiled.called_with == []


def test_an_answer_does_not_lie_in_a_buffer_that_the_next_call_writes_to() -> None:
    kept = torch.zeros(2, 3)
    program = Program((ProgramInput(torch.float32, (Dimension(1, None), Dimension(3, 3))),), 1, None, ("kept",))
    package = CheckedPackage(lambda x: {"kept": kept.copy_(x)}, program)
    first = package(torch.ones(2, 3))
    package(torch.zeros(2, 3))
    assert torch.equal(first["kept"], torch.ones(2, 3))


def test_compiled_code_reads_memory_in_its_own_order() -> None:
    package, _ = checked(1, 64, None)
    x = torch.rand(8, 3).t()
    assert not x.is_contiguous()
    assert torch.equal(package(x)["twice"], x * 2)


def test_a_program_whose_rows_depend_on_each_other_cannot_be_filled_up() -> None:
    program = Program((ProgramInput(torch.float32, (Dimension(4, 4), Dimension(8, 8))),), 4, 4)
    check_filling(lambda inputs: inputs[0] * 2, program, "m")
    with pytest.raises(ModelLoadError, match="no request could be answered alone"):
        check_filling(lambda inputs: inputs[0].softmax(0), program, "m")
