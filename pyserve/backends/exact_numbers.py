"""Which whole numbers OpenVINO computes as torch does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pyserve.backends.lookups import schema_name
from pyserve.proof.probe_inputs import LARGEST_SIZE_MAX, InputDomain

Range = tuple[int, int]

_WHOLE = (torch.int64, torch.int32)
_SUMS = frozenset({"aten::sum", "aten::cumsum", "aten::trace"})
_ADDITIONS = frozenset({"aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::rsub", "aten::diff"})

# Its kernels compare, choose and sum whole numbers as fp32, which has all of them up to here.
_EXACT_MAX = 1 << 24
# The numbers of an item may be summed, and the sum doubled a few times.
_SUMS_MAX = 1 << 20
# Operators that compute with a number of the code, where others have sizes and places.
_OF_SCALARS = frozenset({
    "add", "sub", "rsub", "full", "full_like", "new_full", "scalar_tensor", "fill", "where", "masked_fill", "clamp",
    "clamp_min", "clamp_max", "remainder", "fmod", "div", "floor_divide", "bitwise_and", "bitwise_or", "bitwise_xor",
    "constant_pad_nd", "pad", "index_fill", "scatter", "mul",
})  # fmt: skip
# With what an input may hold they compare exactly, as long as the number has 32 bits.
_COMPARING = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
# Numbers up to this one are always within: masks, kinds of tokens, parts of pictures.
_SMALL_MAX = 255


def exact_ranges(ranges: Sequence[Range | None], domains: Sequence[InputDomain]) -> list[Range | None]:
    """``ranges``, one per input, without the whole numbers that OpenVINO may round where torch does not.

    Inputs that look up rows, or whose numbers the archive bounds, keep their range as far as fp32 has every number
    in it. Of others nobody knows what is computed with them.
    """
    return [_exact(given, domain) for given, domain in zip(ranges, domains, strict=True)]


def _exact(given: Range | None, domain: InputDomain) -> Range | None:
    if domain.dtype not in _WHOLE:
        return given
    largest = torch.iinfo(torch.int32).max
    if given is None or max(abs(given[0]), abs(given[1])) >= largest:
        most = max(_SMALL_MAX, _SUMS_MAX // max(1, _count(domain)))
    else:
        most = _EXACT_MAX
    low, high = given or (-most, most)
    return max(low, -most), min(high, most)


def rounded_sums(program: Any, domains: Sequence[InputDomain]) -> str:
    """Why sums of a program's whole numbers may be rounded, though each of them is exact; ``""`` if they may not be.

    Sums of masks count, and those of inputs that nobody bounds stay small by `exact_ranges`. Sums of rows that are
    looked up, such as numbers of words, do not.

    Args:
        program: a ``torch.export.ExportedProgram``, with one of ``domains`` for each of its inputs.
    """
    names = list(program.graph_signature.user_inputs)
    count = max((_count(domain) for domain in domains), default=1)
    largest: dict[Any, int] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            domain = domains[names.index(node.name)]
            if domain.dtype in _WHOLE and domain.values is not None:
                largest[node] = min(_EXACT_MAX, int(max(abs(each) for each in domain.values)))  # by `exact_ranges`
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dtype not in _WHOLE:
            continue  # sums of floats are rounded by torch too, and a comparison gives a mask
        given = [largest.get(each, 0) for each in node.all_input_nodes]
        name = schema_name(node)
        if name in _SUMS:
            largest[node] = max(given, default=0) * count
        elif name in _ADDITIONS:
            largest[node] = sum(given) + sum(abs(each) for each in node.args if isinstance(each, int))
        else:
            largest[node] = max(given, default=0)
        if largest[node] > _EXACT_MAX:
            return "it sums whole numbers, of which OpenVINO has fewer than torch"
    return ""


def constants_beyond(program: Any) -> bool:
    """Whether an ``ExportedProgram`` has whole numbers of its own that OpenVINO may round, or that end at 32 bits
    there: in a table of which no probe may ask that row, or in a branch for one number.
    """
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants
    }  # fmt: skip
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names and node.users:
            tensor = program.state_dict.get(names[node.name], program.constants.get(names[node.name]))
            if _largest(tensor) > _EXACT_MAX:
                return True
        name = schema_name(node).removeprefix("aten::")
        if name not in _OF_SCALARS | _COMPARING or not any(map(_is_whole, (node, *node.all_input_nodes))):
            continue
        most = _EXACT_MAX if name in _OF_SCALARS else torch.iinfo(torch.int32).max
        if any(type(each) is int and abs(each) > most for each in (*node.args, *node.kwargs.values())):
            return True
    return False


def _largest(tensor: Any) -> int:
    """Without its sign, of whole numbers."""
    is_whole = isinstance(tensor, torch.Tensor) and tensor.dtype in _WHOLE
    return max(abs(int(each)) for each in tensor.aminmax()) if is_whole and tensor.numel() else 0


def _is_whole(node: Any) -> bool:
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(each, torch.Tensor) and each.dtype in _WHOLE for each in parts)


def _count(domain: InputDomain) -> int:
    """The numbers of an item, at most."""
    return math.prod(max(low, LARGEST_SIZE_MAX) if high is None else high for low, high in domain.sizes)
