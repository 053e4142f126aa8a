"""Whether a TorchScript program looks at the numbers of a whole batch.

``if (x > 2).any()`` is one question about all items of a batch: what is done with one then depends on the others.
Trials do not show it where the answer is the same for all numbers but rare ones, so the graph is searched for a bool,
an int or a float that is made of the numbers of a tensor, which come from an input. Sizes are none of those.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch

# They answer with a number, but not about a tensor's numbers.
_ABOUT_KINDS = frozenset({
    "aten::size", "aten::len", "aten::dim", "aten::stride", "aten::is_floating_point", "aten::is_complex",
    "aten::is_contiguous", "aten::device", "aten::get_device", "aten::element_size", "aten::storage_offset",
    "aten::is_signed", "aten::is_conj", "aten::is_neg", "aten::result_type", "aten::can_cast", "aten::sym_size",
    "prim::dtype", "prim::device", "prim::layout", "prim::is_cuda", "prim::is_cpu", "prim::is_quantized",
    "prim::is_sparse", "prim::is_nested", "prim::is_mkldnn", "prim::is_xpu", "prim::is_mps", "prim::is_meta",
    "prim::requires_grad", "aten::__is__", "aten::__isnot__", "aten::__len__", "prim::type",
})  # fmt: skip
# Without a dimension they are one question about all items of a batch too, also where the answer stays a tensor.
_REDUCTIONS = frozenset({
    "aten::any", "aten::all", "aten::max", "aten::min", "aten::amax", "aten::amin", "aten::aminmax", "aten::argmax",
    "aten::argmin", "aten::sum", "aten::nansum", "aten::mean", "aten::nanmean", "aten::median", "aten::prod",
    "aten::std", "aten::var", "aten::norm", "aten::linalg_vector_norm", "aten::count_nonzero", "aten::bincount",
    "aten::histc", "aten::unique", "aten::_unique2", "aten::unique_consecutive",
})  # fmt: skip
_NUMBERS = frozenset({"BoolType", "IntType", "FloatType", "NumberType", "ComplexType", "StringType"})


# One at a time tells torch how to compare.
_lock = threading.Lock()


def program_reads(file: BinaryIO) -> str:
    """The operators by which the TorchScript in ``file`` looks at its inputs' numbers; ``""`` if there are none.

    Reads the code and not the weights, where torch can do without them.

    Raises:
        Exception: torch's, if it is no TorchScript.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            with _unequal_without_numbers():
                program = torch.jit.load(_without_weights(file), map_location="meta")
        except (RuntimeError, NotImplementedError):  # packed weights of quantized layers are unpacked while it is read
            file.seek(0)
            program = torch.jit.load(file, map_location="cpu")
    return graph_reads(program.inlined_graph)


def _without_weights(file: BinaryIO) -> BinaryIO:
    slim = io.BytesIO()
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(slim, "w", zipfile.ZIP_STORED) as copy:
        for entry in whole.infolist():
            is_weight = "/data/" in entry.filename or "/constants/" in entry.filename
            copy.writestr(entry.filename, b"" if is_weight else whole.read(entry))
    slim.seek(0)
    return slim


@contextlib.contextmanager
def _unequal_without_numbers() -> Iterator[None]:
    """Reading a frozen program compares its constants, to keep equal ones once. These here have no numbers."""
    with _lock:
        library = torch.library.Library("aten", "IMPL")
        try:
            library.impl("equal", lambda left, right: False, "Meta")
            yield
        finally:
            library._destroy()


def graph_reads(graph: Any) -> str:
    """The operators by which an inlined graph looks at its inputs' numbers, such as ``aten::Bool``."""
    marked = {value.debugName() for value in list(graph.inputs())[1:]}
    found: dict[str, None] = {}
    before = -1
    while before != len(marked):  # what a loop carries is known after it was walked through
        before = len(marked)
        _walk(graph, marked, found)
    return ", ".join(found)


def _walk(block: Any, marked: set[str], found: dict[str, None]) -> None:
    """Marks what is made of the inputs' numbers in this block and those inside of it."""
    for node in block.nodes():
        kind = node.kind()
        if kind in _ABOUT_KINDS:
            continue
        is_made_of_them = any(each.debugName() in marked for each in node.inputs())
        for inner in node.blocks():
            _enter(node, inner, marked)
            _walk(inner, marked, found)
            results = [each.debugName() for each in inner.outputs()]
            results = results[1:] if kind == "prim::Loop" else results
            for result, output in zip(results, node.outputs(), strict=False):
                if result in marked:
                    marked.add(output.debugName())
        if list(node.blocks()) or not is_made_of_them:
            continue
        if kind in _REDUCTIONS and _is_about_all(node):
            found[f"{kind} of all"] = None
        for output in node.outputs():
            if output.type().kind() not in _NUMBERS:
                marked.add(output.debugName())
            elif any(each.debugName() in marked and each.type().kind() == "TensorType" for each in node.inputs()):
                found[kind] = None


def _is_about_all(node: Any) -> bool:
    """Whether a reduction has no dimension, and nothing to compare its tensor with element by element."""
    try:
        names = [argument.name for argument in torch._C.parse_schema(node.schema()).arguments]
    except RuntimeError:
        return True
    if "other" in names:
        return False
    if "dim" not in names or names.index("dim") >= len(list(node.inputs())):
        return True
    given = list(node.inputs())[names.index("dim")]
    if given.type().kind() == "NoneType":
        return True
    value = given.toIValue() if given.node().kind() == "prim::Constant" else None
    if given.node().kind() == "prim::ListConstruct":
        return not list(given.node().inputs())
    return isinstance(value, list) and not value


def _enter(node: Any, inner: Any, marked: set[str]) -> None:
    """What a loop carries in is its body's second input and so on; an ``if`` has no inputs of its own."""
    carried = list(node.inputs())[2:] if node.kind() == "prim::Loop" else list(node.inputs())
    places = list(inner.inputs())[1:] if node.kind() == "prim::Loop" else list(inner.inputs())
    for given, place in zip(carried, places, strict=False):
        if given.debugName() in marked:
            marked.add(place.debugName())
    if node.kind() == "prim::Loop":
        for result, place in zip(list(inner.outputs())[1:], places, strict=False):
            if result.debugName() in marked:
                marked.add(place.debugName())
