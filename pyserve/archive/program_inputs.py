"""What one item of a model's inputs is, read from the model's own file, where model-config.yaml does not say.

    .pt2 of torch.export        the sizes and dtypes that it was exported for
    .pt2 of AOTInductor         those that it was compiled for
    TorchScript                 inputs bundled with it (torch.utils.bundled_inputs), else metadata.json among its
                                extra files
    any                         metadata.json beside it, see `v2_metadata`

Read as text; nothing of the file is run.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from pyserve.archive.inert_pickle import Named, Stored, read_inert
from pyserve.archive.limits import Limits
from pyserve.archive.v2_metadata import METADATA_NAME, inputs_of_metadata
from pyserve.archive.v2_metadata import SIZE_MAX as METADATA_SIZE_MAX
from pyserve.archive.weights import Weights, check_inflation
from pyserve.errors import ServeError
from pyserve.input_config import read_inputs
from pyserve.regular_file import open_regular

if TYPE_CHECKING:
    from pyserve.proof.package_rules import Program

_BUNDLED = "_bundled_inputs_deflated_forward"
_PICKLE_SIZE_MAX = 64 << 20
_SIZE_MAX = 1 << 20  # what is said to be larger is nobody's limit
_STORAGE_DTYPES = {
    "torch.FloatStorage": "float32", "torch.DoubleStorage": "float64", "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16", "torch.CharStorage": "int8", "torch.ShortStorage": "int16",
    "torch.IntStorage": "int32", "torch.LongStorage": "int64", "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}  # fmt: skip
# What is raised for a file that is damaged, encrypted, or not of the form that its kind has.
_UNREADABLE = (
    ServeError, zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, TypeError, LookupError,
    AttributeError, RuntimeError,
)  # fmt: skip


def inputs_in(weights: Weights, label: str, limits: Limits) -> tuple[Any, str] | None:
    """The value of ``input`` in model-config.yaml, and which part of the file says so; None if nothing does, or it
    inflates beyond ``limits``."""  # fmt: skip
    try:
        check_inflation(weights, limits, label)  # before anything of it is inflated
        found = _of_program(weights, label) if weights.suffix == ".pt2" else _of_script(weights)
        if found is not None:
            read_inputs(found[0], label)
        return found
    except _UNREADABLE:
        return None  # what loads the file says what is wrong with it


def _of_program(weights: Weights, label: str) -> tuple[Any, str]:
    from pyserve.proof.export_rules import read_exported
    from pyserve.proof.package_rules import read_program

    with weights.open() as file, zipfile.ZipFile(file) as members:
        compiled = any("/aotinductor/" in name for name in members.namelist())
    if compiled:
        return _described(read_program(weights.as_file(), label)), "the package"
    with weights.open() as file:
        return _described(read_exported(file, label)), "the exported program"


def _described(program: Program) -> Any:
    symbols = [size.symbol for each in program.inputs for size in each.dimensions[1:] if size.symbol]
    shared = {symbol for symbol in symbols if symbols.count(symbol) > 1}
    described = []
    for number, each in enumerate(program.inputs):
        sizes = each.dimensions[1:]
        entry: dict[str, Any] = {
            "dtype": str(each.dtype).removeprefix("torch."),
            "shape": [_size(size.min, size.max) for size in sizes],
        }
        if len(program.inputs) > 1:
            entry["name"] = each.name or f"input_{number}"
        free = [size.symbol or f"own_{number}_{axis}" for axis, size in enumerate(sizes) if size.min != size.max]
        if free and shared:
            entry["same"] = free
        described.append(entry)
    return described[0] if len(described) == 1 else described


def _size(low: int, high: int | None) -> int | str:
    if low == high:
        return low
    if high is None or high > _SIZE_MAX:
        return -1 if low <= 1 else f"{low}.."
    return f"{low}..{high}"


def inputs_beside(folder: Path, label: str) -> tuple[Any, str] | None:
    """The same, of metadata.json in ``folder``."""
    try:
        with open(open_regular(folder / METADATA_NAME), "rb") as file:
            return _of_metadata(file.read(METADATA_SIZE_MAX), label)
    except _UNREADABLE:
        return None


def _of_metadata(text: bytes, label: str) -> tuple[Any, str] | None:
    found = inputs_of_metadata(text)
    if found is None:
        return None
    read_inputs(found, label)
    return found, METADATA_NAME


def _of_script(weights: Weights) -> tuple[Any, str] | None:
    with weights.open() as file, zipfile.ZipFile(file) as members:
        pickled = _read(members, "data.pkl", _PICKLE_SIZE_MAX)
        metadata = _read(members, f"extra/{METADATA_NAME}", METADATA_SIZE_MAX)
    return _bundled(pickled) or _of_metadata(metadata, weights.name)


def _read(members: zipfile.ZipFile, wanted: str, size_max: int) -> bytes:
    """A file of TorchScript; empty if it has none, or one that is larger."""
    name = next((name for name in members.namelist() if name.partition("/")[2] == wanted), None)
    return b"" if name is None or members.getinfo(name).file_size > size_max else members.read(name)


def _bundled(content: bytes) -> tuple[Any, str] | None:
    if _BUNDLED.encode() not in content:
        return None
    module = read_inert(cast(BinaryIO, io.BytesIO(content)))
    examples = module.state.get(_BUNDLED) if isinstance(module, Named) and isinstance(module.state, dict) else None
    if isinstance(examples, Named):  # in the words that give the list its type
        examples = examples.arguments[0] if examples.arguments else None
    if not isinstance(examples, list) or not examples:
        return None
    rows = [[_tensor(each) for each in (example if isinstance(example, tuple) else (example,))] for example in examples]
    if any(len(row) != len(rows[0]) or None in row for row in rows):
        return None
    described = [_merged([row[index] for row in rows]) for index in range(len(rows[0]))]  # type: ignore[misc]
    if any(each is None for each in described):
        return None
    for number, each in enumerate(described):
        if each is not None and len(described) > 1:
            each["name"] = f"input_{number}"
    return (described[0] if len(described) == 1 else described), "inputs bundled with the model"


def _tensor(value: Any) -> tuple[str, tuple[int, ...]] | None:
    """Dtype and shape, the batch included, of what a pickle says is a tensor."""
    if not (isinstance(value, Named) and value.name == "torch._utils._rebuild_tensor_v2"):
        return None
    storage, _, sizes = value.arguments[:3]
    if not isinstance(storage, Stored):
        return None
    dtype = _STORAGE_DTYPES.get(getattr(storage.key[1], "name", ""))
    if dtype is None or not sizes or not all(type(size) is int and size > 0 for size in sizes):
        return None
    return dtype, tuple(sizes)


def _merged(examples: list[tuple[str, tuple[int, ...]]]) -> dict[str, Any] | None:
    """One item of the input that these are of: what differs among them may have any size."""
    dtypes = {dtype for dtype, _ in examples}
    ranks = {len(sizes) for _, sizes in examples}
    if len(dtypes) > 1 or len(ranks) > 1:
        return None
    columns = list(zip(*(sizes for _, sizes in examples), strict=True))[1:]
    return {"dtype": dtypes.pop(), "shape": [column[0] if len(set(column)) == 1 else -1 for column in columns]}
