"""What an AOTInductor package was compiled for, read from the sources that torch keeps beside the compiled code.

Compiled code believes its inputs: given another size, dtype or layout it reads memory that is not the input's. The code
that could check them is in the package, but torch runs it only if an environment variable is set when the package is
first called, and then it refuses batches of one that the export allowed. So the rules are read here, once, and checked
for each request by the engine (csrc/input_rules.h), or by `CheckedPackage` in a worker process.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pyserve.damaged_zip import DAMAGED_ZIP
from pyserve.errors import ModelLoadError
from pyserve.handler import InputError
from pyserve.proof.batch_probe import Run, rows_are_independent
from pyserve.proof.package_writes import written_constants
from pyserve.proof.probe_inputs import ITEMS_MAX, InputDomain, batch_rows

_SOURCE = re.compile(r"data/aotinductor/model/[^/]*wrapper\.cpp$")
# More than the largest seen by far; what is longer is not read.
_SOURCE_SIZE_MAX = 64 << 20

_HANDLE = re.compile(r"ConstantHandle (\w+) = ConstantHandle\(input_handles\[(\d+)\]\);")
_COUNT = re.compile(r"steal_from_raw_handles_to_raii_handles\(input_handles, (\d+)\)")
_DTYPE = re.compile(r"int32_t (\w+)_expected_dtype = aoti_torch_dtype_(\w+)\(\);")
_STATIC = re.compile(r"if \((\d+) != (\w+)_(size|stride)\[(\d+)\]\)")
_BOUND = re.compile(r"if \((\w+)_size\[(\d+)\] ([<>]) (\d+)\)")
_LAYOUT = re.compile(r'assert_size_stride\((\w+), \{([^}]*)\}, \{([^}]*)\}, "input"\)')
# Where nothing says how large a dimension may be.
_SIZE_MAX = (1 << 63) - 1
# torch compiles no dynamic dimension for sizes 0 and 1; the code is right for 1 where the export allowed it, which the
# package does not say, so a batch of one is tried.
SPECIALIZED_MIN = 2

EXPORT_FIX = (
    "export it again with dynamic_shapes that give this dimension a range, such as "
    "torch.export.Dim('length', min=1, max=512)"
)


@dataclass(frozen=True)
class Dimension:
    """Sizes that one dimension may have; ``max`` is None without a known one. ``symbol`` is ``""`` if it is fixed."""

    min: int
    max: int | None
    symbol: str = ""


@dataclass(frozen=True)
class ProgramInput:
    """One input of a compiled program, the batch among its dimensions; ``name`` is ``""`` where the file gives none."""

    dtype: torch.dtype
    dimensions: tuple[Dimension, ...]
    is_channels_last: bool = False
    name: str = field(default="", compare=False)


@dataclass(frozen=True)
class Program:
    """What a compiled or exported program takes.

    Attributes:
        rows_min, rows_max: sizes of its batch; rows_max is None if any is taken.
        written: the constants that a call may write to or give away, as the package's source names them.
        is_compiled: by AOTInductor; else it is what torch.export saved.
    """

    inputs: tuple[ProgramInput, ...]
    rows_min: int
    rows_max: int | None
    written: tuple[str, ...] = ()
    is_compiled: bool = True

    @property
    def noun(self) -> str:
        """What to call it in messages."""
        return "package" if self.is_compiled else "program"

    @property
    def made(self) -> str:
        """How it came about, for messages."""
        return "compiled" if self.is_compiled else "exported"

    @property
    def takes_one_row_unsaid(self) -> bool:
        """Whether its batch is dynamic, so that nothing says how it treats a batch of one."""
        return self.rows_min == 1 and self.rows_max != 1

    def rules(
        self, names: Sequence[str], domains: Sequence[InputDomain]
    ) -> list[tuple[str, torch.dtype, list[tuple[int, int, str]]]]:
        """As ``_core.Lane.set_input_rules`` takes them; ``domains`` are those of `fitted_domains`."""
        return [
            (name, each.dtype, [(low, _SIZE_MAX if high is None else high, size.symbol)
                                for (low, high), size in zip(domain.sizes, each.dimensions[1:], strict=True)])
            for name, each, domain in zip(names, self.inputs, domains, strict=True)
        ]  # fmt: skip


def is_compiled(path: Path) -> bool:
    """Whether a ``.pt2`` file was compiled by AOTInductor; else it is an exported program.

    Raises:
        ModelLoadError: it is no zip file.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return any("/aotinductor/" in name for name in file.namelist())
    except DAMAGED_ZIP as error:
        raise ModelLoadError(f"{path.name} is not a .pt2 package: {error}") from error


def read_program(path: Path, label: str) -> Program:
    """What the package at ``path`` was compiled for.

    Raises:
        ModelLoadError: it does not say, so that nothing it is asked could be checked.
    """
    source = None
    try:
        with zipfile.ZipFile(path) as file:
            names = [name for name in file.namelist() if _SOURCE.search(name)]
            if len(names) == 1 and file.getinfo(names[0]).file_size <= _SOURCE_SIZE_MAX:
                source = file.read(names[0]).decode("utf-8", "replace")
    except DAMAGED_ZIP as error:
        raise ModelLoadError(f"{label}: the package cannot be read: {error}") from error
    if source is None:
        raise ModelLoadError(
            f"{label}: the package does not hold the source of its one program, which says what sizes it was "
            "compiled for; make it with torch._inductor.aoti_compile_and_package of torch 2.11 or later"
        )
    return _program_of(source, label)


def _program_of(source: str, label: str) -> Program:
    handles = {int(index): name for name, index in _HANDLE.findall(source)}
    counts = {int(count) for count in _COUNT.findall(source)}
    dtypes = dict(_DTYPE.findall(source))
    layouts = {name: (_split(sizes), _split(strides)) for name, sizes, strides in _LAYOUT.findall(source)}
    if not handles or counts != {len(handles)} or sorted(handles) != list(range(len(handles))):
        raise ModelLoadError(
            f"{label}: the package does not say what each of its inputs may be, so that requests cannot be checked; "
            "compile it with torch 2.11 or later, for tensors as inputs"
        )
    inputs = [
        _input(source, handles[index], dtypes, layouts, f"{label}: input {index} of the package")
        for index in range(len(handles))
    ]
    return program_taking(inputs, label, written_constants(source))


def program_taking(
    inputs: Sequence[ProgramInput], label: str, written: tuple[str, ...] = (), *, is_compiled: bool = True
) -> Program:
    """The program with these inputs.

    Raises:
        ModelLoadError: they do not share their batch.
    """
    batches = {(each.dimensions[0].min, each.dimensions[0].max, each.dimensions[0].symbol) for each in inputs}
    if len(batches) != 1:
        what = "package" if is_compiled else "program"
        raise ModelLoadError(
            f"{label}: the inputs of the {what} do not share their first dimension, the batch; export it with one "
            "torch.export.Dim for dimension 0 of all inputs"
        )
    ((low, high, _),) = batches
    # A compiled one does not say whether it takes one row; an exported one does.
    rows_min = 1 if is_compiled and low <= SPECIALIZED_MIN and low != high else low
    return Program(tuple(inputs), rows_min, high, written, is_compiled)


def _input(
    source: str, name: str, dtypes: dict[str, str], layouts: dict[str, tuple[list[str], list[str]]], label: str
) -> ProgramInput:
    dtype = getattr(torch, dtypes.get(name, ""), None)
    static: dict[str, dict[int, int]] = {"size": {}, "stride": {}}
    for value, owner, kind, axis in _STATIC.findall(source):
        if owner == name:
            static[kind][int(axis)] = int(value)
    bounds: dict[int, dict[str, int]] = {}
    for owner, axis, sign, value in _BOUND.findall(source):
        if owner == name:
            bounds.setdefault(int(axis), {})[sign] = int(value)
    sizes, strides = layouts.get(name, ([], []))
    rank = len(sizes) or 1 + max([-1, *static["size"], *bounds])
    if not isinstance(dtype, torch.dtype) or rank < 1:
        raise ModelLoadError(f"{label} has no batch dimension, or is no tensor")
    dimensions = []
    for axis in range(rank):
        if axis in static["size"]:
            dimensions.append(Dimension(static["size"][axis], static["size"][axis]))
            continue
        symbol = sizes[axis] if sizes else "batch" if axis == 0 else ""
        if not re.fullmatch(r"\w*", symbol):
            raise ModelLoadError(
                f"{label}: its dimension {axis} was compiled as {symbol.replace('L', '')}, which "
                "cannot be checked; export it with a size of its own"
            )
        found = bounds.get(axis, {})
        dimensions.append(Dimension(found.get("<", 1), found.get(">"), symbol))
    is_channels_last = _is_channels_last(rank, static["stride"], strides)
    if not is_channels_last and _innermost(rank, static["stride"], strides) not in (1, None):
        raise ModelLoadError(
            f"{label} was compiled for a tensor that is not contiguous; export it with a contiguous example"
        )
    return ProgramInput(dtype, tuple(dimensions), is_channels_last)


def _split(text: str) -> list[str]:
    return [re.sub(r"(?<=\d)L\b", "", part.strip()) for part in text.split(",") if part.strip()]


def _innermost(rank: int, static: dict[int, int], strides: list[str]) -> int | None:
    if rank - 1 in static:
        return static[rank - 1]
    return int(strides[-1]) if strides and strides[-1].isdigit() else None


def _is_channels_last(rank: int, static: dict[int, int], strides: list[str]) -> bool:
    if rank != 4:
        return False
    channel = static.get(1, int(strides[1]) if len(strides) == 4 and strides[1].isdigit() else None)
    innermost = _innermost(rank, static, strides)
    return channel == 1 and innermost != 1


def check_against(program: Program, example: Sequence[torch.Tensor], names: Sequence[str], label: str) -> None:
    """Checks what a handler feeds the program, by one item [1, ...] per input.

    Raises:
        ModelLoadError: the program was made for something else.
    """
    made = f"{program.noun} was {program.made}"
    if len(example) != len(program.inputs):
        raise ModelLoadError(
            f"{label}: the {program.noun} takes {len(program.inputs)} inputs, model-config.yaml's 'input' describes "
            f"{len(example)}"
        )
    for name, each, wanted in zip(names, example, program.inputs, strict=True):
        if each.dtype != wanted.dtype:
            raise ModelLoadError(
                f"{label}: {name} is {_dtype(each.dtype)}, but the {made} for {_dtype(wanted.dtype)}; "
                f"write 'dtype: {_dtype(wanted.dtype)}' in model-config.yaml's 'input'"
            )
        if each.dim() != len(wanted.dimensions):
            raise ModelLoadError(
                f"{label}: {name} has {each.dim() - 1} dimensions without the batch, but the {made} for "
                f"{len(wanted.dimensions) - 1}; correct 'shape' in model-config.yaml's 'input'"
            )


def fitted_domains(
    program: Program, domains: Sequence[InputDomain], names: Sequence[str], label: str
) -> list[InputDomain]:
    """What both the program and model-config.yaml allow.

    Raises:
        ModelLoadError: that is nothing, or a dimension of a compiled one has no known largest size.
    """
    fitted = []
    for name, domain, wanted in zip(names, domains, program.inputs, strict=True):
        sizes: list[tuple[int, int | None]] = []
        for axis, ((low, high), limit) in enumerate(zip(domain.sizes, wanted.dimensions[1:], strict=True), 1):
            highest = limit.max if high is None else high if limit.max is None else min(high, limit.max)
            lowest = max(low, limit.min)
            if highest is None and program.is_compiled:
                raise ModelLoadError(
                    f"{label}: dimension {axis} of {name} was compiled for any size, so that nothing keeps a request "
                    "from having the program read beyond its tables; give it a range in model-config.yaml, such as "
                    f"'shape: [{lowest}..512]' (or pad_to), or {EXPORT_FIX}"
                )
            if highest is not None and lowest > highest:
                compiled = f"{limit.min}" if limit.min == limit.max else f"{limit.min} to {limit.max}"
                raise ModelLoadError(
                    f"{label}: dimension {axis} of {name} is {low if low == high else f'{low} to {high}'} in "
                    f"model-config.yaml, but the {program.noun} was {program.made} for {compiled}; correct 'shape' "
                    "there"
                )
            sizes.append((lowest, highest))
        free = [(low, _SIZE_MAX if high is None else high) for low, high in sizes if low != high]
        pad_to = tuple(size for size in domain.pad_to if any(low <= size <= high for low, high in free))
        symbols = [limit.symbol for (low, high), limit in zip(sizes, wanted.dimensions[1:], strict=True) if low != high]
        fitted.append(replace(domain, sizes=tuple(sizes), pad_to=pad_to, same=domain.same or tuple(symbols)))
    return fitted


def fitted_example(example: Sequence[torch.Tensor], domains: Sequence[InputDomain]) -> list[torch.Tensor]:
    """``example``, or one like it of sizes that ``domains`` allow."""
    shapes = []
    for each, domain in zip(example, domains, strict=True):
        sizes = zip(each.shape[1:], domain.sizes, strict=True)
        shapes.append((1, *(max(low, size if high is None else min(size, high)) for size, (low, high) in sizes)))
    if shapes == [tuple(each.shape) for each in example]:
        return list(example)
    resized = [each.new_zeros(shape) for each, shape in zip(example, shapes, strict=True)]
    return list(batch_rows(resized, domains, 1)[0])


def out_structure(call_spec: Sequence[str]) -> Callable[[Any], Any] | None:
    """Puts the flat outputs of a package back into the dicts and tuples that its model returned; None if it is one
    tensor, or if the package does not say.

    Args:
        call_spec: of ``_core.TorchModel.call_spec``: the specs of inputs and outputs.
    """
    if len(call_spec) != 2 or _is_leaf(call_spec[1]):
        return None
    from torch.utils import _pytree

    try:
        spec = _pytree.treespec_loads(call_spec[1])
    except Exception:  # a class that this process does not know; the flat outputs remain
        return None

    def restored(outputs: Any) -> Any:
        leaves = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        return _pytree.tree_unflatten(leaves, spec) if len(leaves) == spec.num_leaves else outputs

    return restored


def check_filling(run: Run, program: Program, label: str) -> None:
    """Checks that batches smaller than the program takes may be filled up with copies of a row.

    Args:
        run: the program: tensors [rows_min, ...] -> its output.

    Raises:
        ModelLoadError: the answer for an item depends on the others in its batch.
    """
    if program.rows_min == 1:
        return
    shapes = [tuple(size.min for size in each.dimensions[1:]) for each in program.inputs]
    example = [torch.zeros((1, *shape), dtype=each.dtype) for shape, each in zip(shapes, program.inputs, strict=True)]
    domains = [InputDomain(each.dtype, tuple((size, size) for size in each.shape[1:])) for each in example]
    if not rows_are_independent(run, batch_rows(example, domains, ITEMS_MAX), program.rows_min):
        raise ModelLoadError(
            f"{label}: the package was compiled for batches of {program.rows_min} or more, and its answer for an item "
            "depends on the others in its batch, so that no request could be answered alone; export it again with "
            "torch.export.Dim('batch', min=1, ...) for dimension 0"
        )


def _is_leaf(spec: str) -> bool:
    try:
        return json.loads(spec)[1]["type"] is None
    except (ValueError, LookupError, TypeError):
        return True


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class CheckedPackage:
    """A package, or an exported program, as torch loads it, which runs only what it was made for; in a worker process.

    A batch of another size than it takes is run in pieces, or filled up with copies of its last row. Outputs of one
    that writes to its constants are copies, since the next call would change the constants.

    Raises (when it is called):
        InputError: a size or dtype that it was not made for.
    """

    def __init__(self, call: Callable[..., Any], program: Program):
        self._call = call
        self._program = program

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        program = self._program
        if len(inputs) != len(program.inputs):
            raise InputError(f"the model takes {len(program.inputs)} inputs, got {len(inputs)}")
        seen: dict[str, int] = {}
        laid_out = [self._checked(index, each, seen) for index, each in enumerate(inputs)]
        rows = laid_out[0].shape[0]
        low, high = program.rows_min, program.rows_max
        if low <= rows and (high is None or rows <= high):
            return self._run(laid_out)
        if rows < low:
            filled = [torch.cat([each, each[-1:].expand(low - rows, *each.shape[1:])]) for each in laid_out]
            return self._cut(self._run(filled), rows, low)
        assert high is not None  # else any number of rows is taken
        parts = [self(*(each[at : at + high] for each in laid_out)) for at in range(0, rows, high)]
        return _joined(parts)

    def _run(self, inputs: Sequence[torch.Tensor]) -> Any:
        from torch.utils import _pytree

        output = self._call(*inputs)
        if not self._program.written:
            return output
        return _pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, output)

    def _checked(self, index: int, tensor: torch.Tensor, seen: dict[str, int]) -> torch.Tensor:
        wanted, made = self._program.inputs[index], self._program.made
        label = f"input {index + 1}"
        if tensor.dtype != wanted.dtype or tensor.dim() != len(wanted.dimensions):
            raise InputError(
                f"{label}: the model was {made} for {_dtype(wanted.dtype)} with {len(wanted.dimensions) - 1} "
                f"dimensions, got {_dtype(tensor.dtype)} with {tensor.dim() - 1}"
            )
        for axis, (size, limit) in enumerate(zip(tensor.shape[1:], wanted.dimensions[1:], strict=True), 1):
            if size < limit.min or (limit.max is not None and size > limit.max):
                high = "any" if limit.max is None else limit.max
                allowed = f"{limit.min}" if limit.min == limit.max else f"{limit.min} to {high}"
                raise InputError(f"{label}: dimension {axis} has size {size}; the model was {made} for {allowed}")
            if limit.symbol and seen.setdefault(limit.symbol, size) != size:
                raise InputError(f"{label}: dimension {axis} has size {size}, but must have {seen[limit.symbol]}")
        if wanted.is_channels_last:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor.contiguous()

    @staticmethod
    def _cut(output: Any, rows: int, filled: int) -> Any:
        from torch.utils import _pytree

        def cut(leaf: Any) -> Any:
            has_rows = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == filled
            return leaf[:rows] if has_rows else leaf

        return _pytree.tree_map(cut, output)


def _joined(parts: Sequence[Any]) -> Any:
    from torch.utils import _pytree

    flat = [_pytree.tree_flatten(part) for part in parts]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    joined = [torch.cat(column) if isinstance(column[0], torch.Tensor) and column[0].dim() else column[0]
              for column in map(list, columns)]  # fmt: skip
    return _pytree.tree_unflatten(joined, flat[0][1])
