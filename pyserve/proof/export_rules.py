"""What a program that torch.export saved (``.pt2``, not compiled) takes, read from the text of its graph.

torch.export.load unpickles what is in the file, so it is called in processes of the archive's own only. The sizes and
dtypes of the inputs are in the file as JSON, which anybody may read.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pyserve.damaged_zip import DAMAGED_ZIP
from pyserve.errors import ModelLoadError
from pyserve.proof.package_rules import Dimension, Program, ProgramInput, program_taking

# As torch 2.8 and later have it, and as earlier ones had it.
_GRAPH = re.compile(r"(?:[^/]+/models/[^/]+|(?:[^/]+/)?serialized_exported_program)\.json")
# More than the largest seen by far; what is longer is not read.
_GRAPH_SIZE_MAX = 256 << 20

_SYMBOL = re.compile(r"(?:Symbol\('(\w+)'[^()]*\)|([A-Za-z_]\w*))")
# Numbers of dtypes in the text, of torch's export schema.
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 10: torch.complex64, 12: torch.bool, 13: torch.bfloat16, 28: torch.uint16,
}  # fmt: skip


def read_exported(file: Path | BinaryIO, label: str) -> Program:
    """What the exported program in ``file`` takes.

    Args:
        label: what to call the program in messages.

    Raises:
        ModelLoadError: the file is damaged, or does not say it, or says it in words that cannot be checked.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if _GRAPH.fullmatch(name)]
            has_one = len(names) == 1 and archive.getinfo(names[0]).file_size <= _GRAPH_SIZE_MAX
            graph = json.loads(archive.read(names[0])) if has_one else None
    except DAMAGED_ZIP as error:
        raise ModelLoadError(f"{label} cannot be read as an exported program, it may be damaged: {error}") from error
    if not has_one:
        raise ModelLoadError(f"{label} does not hold the graph of one exported program; save it with torch.export.save")
    try:
        inputs = _inputs(graph, label)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelLoadError(
            f"{label} does not say what it takes, as programs of this torch ({torch.__version__}) do; export it again "
            "with torch.export.export and save it with torch.export.save"
        ) from error
    return program_taking(inputs, label, is_compiled=False)


def _inputs(graph: Any, label: str) -> list[ProgramInput]:
    module = graph["graph_module"]
    tensors, ranges = module["graph"]["tensor_values"], graph["range_constraints"]
    found: list[ProgramInput] = []
    for spec in module["signature"]["input_specs"]:
        argument = spec.get("user_input", {}).get("arg") if "user_input" in spec else None
        if argument is None:
            continue  # a weight
        number = len(found) + 1
        if "as_tensor" not in argument:
            raise ModelLoadError(
                f"{label}: input {number} of the exported program is no tensor; export it with tensors only"
            )
        name = str(argument["as_tensor"]["name"])
        tensor = tensors[name]
        dtype = _DTYPES.get(tensor["dtype"])
        if dtype is None or not tensor["sizes"]:
            raise ModelLoadError(
                f"{label}: input {number} of the exported program has no batch dimension, or a dtype that no request "
                "can hold; export it with a batch as dimension 0"
            )
        sizes = [_dimension(size, ranges, f"{label}: dimension {axis} of input {number}")
                 for axis, size in enumerate(tensor["sizes"])]  # fmt: skip
        found.append(ProgramInput(dtype, tuple(sizes), name=name))
    if not found:
        raise ModelLoadError(f"{label}: the exported program takes no inputs; export it with a batch as its input")
    return found


def _dimension(size: Any, ranges: Any, label: str) -> Dimension:
    if "as_int" in size:
        return Dimension(int(size["as_int"]), int(size["as_int"]))
    text = str(size["as_expr"]["expr_str"])
    found = _SYMBOL.fullmatch(text)
    if found is None:
        plain = re.sub(r"Symbol\('(\w+)'[^()]*\)", r"\1", text)
        raise ModelLoadError(
            f"{label} was exported as {plain[:80]}, which cannot be checked; export it with a size of its own"
        )
    symbol = found[1] or found[2]
    limits = ranges.get(symbol, {})
    low, high = limits.get("min_val"), limits.get("max_val")
    return Dimension(max(1, int(low or 1)), None if high is None else int(high), symbol)
