"""Which rows of its tables a program looks up, and for which numbers of its inputs that is right.

Eager code raises for a row that is not there. What is made of it may answer with whatever lies in memory, or end the
process; so the ranges are found here, in the graph, and inputs outside of them go the plain way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

# Operators that look up rows: where the table is, the dimension (by place or name; None for the first), the indices.
_LOOKUPS: dict[str, tuple[int, int | None, int]] = {
    "aten::embedding": (0, None, 1),
    "aten::index_select": (0, 1, 2),
    "aten::gather": (0, 1, 2),
    "aten::take_along_dim": (0, 2, 1),
}
# They take numbers as places, in ways that nobody distinguishes here.
_OTHERS = frozenset({
    "aten::scatter", "aten::scatter_add", "aten::scatter_reduce", "aten::index_put", "aten::_index_put_impl",
    "aten::index_add", "aten::index_copy", "aten::index_fill", "aten::index_reduce", "aten::take", "aten::put",
    "aten::one_hot", "aten::embedding_bag", "aten::_embedding_bag", "aten::bincount", "aten::embedding_renorm",
    "aten::nll_loss", "aten::nll_loss_nd", "aten::nll_loss2d", "aten::cross_entropy_loss", "aten::repeat_interleave",
    "aten::searchsorted", "aten::unique_dim", "aten::histc", "aten::_unsafe_index", "aten::_unsafe_index_put",
})  # fmt: skip
# What they give holds the same numbers as their first argument, or some of them.
_SAME_NUMBERS = frozenset({
    "aten::to", "aten::_to_copy", "aten::clone", "aten::view", "aten::reshape", "aten::unsqueeze", "aten::squeeze",
    "aten::expand", "aten::expand_as", "aten::slice", "aten::select", "aten::contiguous", "aten::alias", "aten::detach",
    "aten::permute", "aten::transpose", "aten::t", "aten::flatten", "aten::unflatten", "aten::repeat", "aten::flip",
    "aten::long", "aten::type_as", "aten::lift_fresh_copy", "aten::narrow", "aten::movedim", "aten::_unsafe_view",
    "aten::view_as", "aten::reshape_as", "aten::roll", "aten::split", "aten::chunk", "aten::unbind",
})  # fmt: skip
# They give sizes, which the proven ranges of sizes bound, or nothing.
_OF_SIZES = frozenset({"aten::sym_size", "aten::sym_numel", "aten::sym_stride", "aten::_assert_tensor_metadata"})
_MAKERS = frozenset({
    "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::new_zeros", "aten::new_ones", "aten::new_full",
    "aten::empty_like", "aten::new_empty",
})  # fmt: skip

_CLEAN, _DERIVED = "clean", "derived"


@dataclass
class Lookups:
    """What was found.

    Attributes:
        ranges: position of an input -> smallest and largest number that all its lookups have a row for.
        problem: why that is not known; ``""`` if it can.
    """

    ranges: dict[int, tuple[int, int]] = field(default_factory=dict)
    problem: str = ""


def find_lookups(program: Any) -> Lookups:
    """Searches an ``ExportedProgram``."""
    found = Lookups()
    names = list(program.graph_signature.user_inputs)
    kinds: dict[fx.Node, int | str] = {}  # the input whose numbers it holds as they are, or one of the words above
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kinds[node] = names.index(node.name) if node.name in names else _CLEAN
        elif node.op == "call_function":
            kinds[node] = _kind(node, kinds)
            _note(node, kinds, found)
        else:
            kinds[node] = _CLEAN
    return found


def schema_name(node: fx.Node) -> str:
    """The operator's name, such as ``aten::sum``."""
    schema = getattr(node.target, "_schema", None)
    # An operator that works in place takes the same places as the one that does not.
    return str(schema.name).rstrip("_") if schema is not None else str(getattr(node.target, "__name__", node.target))


def _kind(node: fx.Node, kinds: dict[fx.Node, int | str]) -> int | str:
    name = schema_name(node)
    if name in _OF_SIZES or name in _MAKERS:
        return _CLEAN
    given = [kinds[each] for each in node.all_input_nodes]
    if all(each == _CLEAN for each in given):
        return _CLEAN
    first = node.args[0] if node.args else None
    if (name in _SAME_NUMBERS or name == "getitem") and isinstance(first, fx.Node):
        return _CLEAN if kinds[first] == _CLEAN else _cast(node, first, kinds[first])
    return _DERIVED


def _cast(node: fx.Node, before: fx.Node, kind: int | str) -> int | str:
    """A cast may change the numbers: of floats to whole ones, and to types that hold fewer."""
    values = before.meta.get("val"), node.meta.get("val")
    if not all(isinstance(each, torch.Tensor) for each in values):
        return kind
    old, new = (each.dtype for each in values if isinstance(each, torch.Tensor))
    whole = (torch.int64, torch.int32)
    return kind if old == new or (old in whole and new in whole) else _DERIVED


def _note(node: fx.Node, kinds: dict[fx.Node, int | str], found: Lookups) -> None:
    name = schema_name(node)
    if name in _LOOKUPS:
        table_at, dim_at, index_at = _LOOKUPS[name]
        table = node.args[table_at] if len(node.args) > table_at else None
        index = node.args[index_at] if len(node.args) > index_at else None
        dim = 0 if dim_at is None else (node.args[dim_at] if len(node.args) > dim_at else None)
        _look_up(table, dim, index, kinds, found, from_end=False)
    elif name == "aten::index":
        table, indices = node.args[0], node.args[1]
        assert isinstance(indices, (list, tuple))
        for dim, index in enumerate(indices):
            is_mask = isinstance(index, fx.Node) and getattr(index.meta.get("val"), "dtype", None) is torch.bool
            if is_mask:
                found.problem = found.problem or "it takes the rows of a mask, so that sizes depend on numbers"
            elif index is not None:
                _look_up(table, dim, index, kinds, found, from_end=True)
    elif name in _OTHERS:
        whole = [each for each in node.all_input_nodes[1:] if not _is_float(each)] or node.all_input_nodes[:1]
        if any(kinds[each] != _CLEAN for each in whole):
            found.problem = found.problem or f"it takes numbers of its input for places ({name.removeprefix('aten::')})"
    elif isinstance(node.target, torch._ops.HigherOrderOperator):
        found.problem = found.problem or _of_block(node)


def _of_block(node: fx.Node) -> str:
    for each in node.all_input_nodes:
        body = each.op == "get_attr" and getattr(each.graph.owning_module, str(each.target), None)
        if not isinstance(body, fx.GraphModule):
            continue
        for inner in body.graph.nodes:
            name = schema_name(inner)
            if name in _LOOKUPS or name in _OTHERS or name == "aten::index":
                return f"it takes numbers for places ({name.removeprefix('aten::')}) in a branch"
    return ""


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _look_up(
    table: Any, dim: Any, index: Any, kinds: dict[fx.Node, int | str], found: Lookups, *, from_end: bool
) -> None:
    kind = kinds.get(index, _CLEAN)
    if kind == _CLEAN:
        return
    value = table.meta.get("val") if isinstance(table, fx.Node) else None
    rows = value.shape[dim] if isinstance(value, torch.Tensor) and isinstance(dim, int) and value.dim() else None
    if isinstance(kind, str) or not isinstance(rows, int):
        found.problem = found.problem or "it looks up rows of a table by numbers that it computes from its input"
        return
    low, high = found.ranges.get(kind, (-(1 << 62), 1 << 62))
    found.ranges[kind] = max(low, -rows if from_end else 0), min(high, rows - 1)
