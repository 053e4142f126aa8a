"""TorchScript of a program that torch.export saved: what it takes, and that its graph answers as the program does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from pyserve.archive.archive import Archive
from pyserve.conversion.convert import convert_exported
from pyserve.conversion.record import Conversion, NeedsPythonError
from pyserve.errors import ModelLoadError
from pyserve.proof.export_rules import read_exported
from pyserve.proof.package_rules import Program, check_against, fitted_domains, fitted_example
from pyserve.proof.probe_inputs import InputDomain, Probe
from pyserve.torch_error import cause_of


def exported_rules(archive: Archive) -> Program:
    """What the archive's exported program takes; reads the text of its graph only.

    Raises:
        NeedsPythonError: the engine could not check it, or it takes no item alone.
    """
    weights = archive.weights
    assert weights is not None  # else nothing is exported
    try:
        with weights.open() as file:
            program = read_exported(file, f"{archive.name}: {weights.name}")
    except ModelLoadError as error:
        raise NeedsPythonError(error.message) from error
    if program.rows_min > 1:
        exactly = f"{program.rows_min}" + ("" if program.rows_max == program.rows_min else " or more")
        raise NeedsPythonError(
            f"{weights.name} was exported for batches of {exactly}, and smaller ones are filled up in worker processes "
            "only; export it with dynamic_shapes that have torch.export.Dim('batch', min=1) for dimension 0"
        )
    return program


def fit_inputs(
    program: Program, handler: Any, example: Sequence[torch.Tensor], domains: Sequence[InputDomain], label: str
) -> tuple[list[torch.Tensor], list[InputDomain], list[str]]:
    """Example, domains and names of the inputs, as both the handler and a program have them.

    Raises:
        ModelLoadError: they do not go together; the text names the input.
    """
    names = _input_names(handler, len(example))
    check_against(program, example, names, label)
    fitted = fitted_domains(program, domains, names, label)
    return fitted_example(example, fitted), fitted, names


def _input_names(handler: Any, count: int) -> list[str]:
    names = [spec.name for spec in getattr(handler, "specs", ())]
    if len(names) == count and all(names):
        return names
    return [f"input {number}" for number in range(1, count + 1)] if count > 1 else ["input"]


def script_exported(
    archive: Archive, handler: Any, example: Sequence[torch.Tensor], samples: Sequence[Probe], *, freezes: bool
) -> tuple[torch.jit.ScriptModule, Conversion]:
    """TorchScript of the archive's exported program, and why it is believed. Runs what is in the file.

    Raises:
        NeedsPythonError: it cannot be converted; worker processes may run it.
        ModelLoadError: it does not go with what the handler feeds it, or cannot be loaded.
    """
    rules = exported_rules(archive)
    weights = archive.weights
    assert weights is not None  # else nothing is exported
    fitted, domains, _ = fit_inputs(rules, handler, example, InputDomain.of(handler, example), archive.name)
    try:
        with weights.open() as file:
            program = torch.export.load(file)
        module = program.module()
    except Exception as error:  # of many classes, whatever is in the file
        raise unreadable(weights.name, error) from error
    checks = _checks_of_its_own(program)
    if checks:
        raise NeedsPythonError(
            f"{weights.name} checks its inputs when it runs ({checks}), which TorchScript of it would not"
        )
    most = rules.rows_max
    cut = [replace(each, inputs=tuple(tensor[:most] for tensor in each.inputs)) for each in samples]
    return convert_exported(program, module, fitted, domains, cut, rows_max=most, freezes=freezes)


def unreadable(name: str, error: Exception) -> ModelLoadError:
    """What to say of an exported program that torch.export.load refuses."""
    return ModelLoadError(
        f"{name} cannot be loaded as an exported program: {cause_of(str(error)) or type(error).__name__}. It may be "
        f"damaged, or saved by another torch than {torch.__version__}, which is here; export it again with this one"
    )


def _checks_of_its_own(program: Any) -> str:
    """Operators by which a program refuses inputs that its rules allow; ``""`` if there are none."""
    found = {node.target._schema.name for node in program.graph.nodes
             if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)}  # fmt: skip
    code = getattr(program, "_guards_code", None)
    return ", ".join(sorted(found & {"aten::_assert_scalar", "aten::_assert_async"}) + list(code or []))[:200]
