"""TorchScript by way of torch.export: one path, with symbolic sizes, proven for all sizes in their ranges.

torch.export runs the model's code once with symbols for the batch and the free dimensions. Wherever the code, or an
operator, asks something about them that is not true in the whole range, or about the data, it refuses. What comes out
is a flat graph of operators in which sizes are still sizes; TorchScript compiles it as it stands.
"""

from __future__ import annotations

import builtins
import logging
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from pyserve.proof.probe_inputs import InputDomain, batch_rows

# Sizes of the example that torch.export runs: unlike each other and unlike what layers usually have.
_BATCH = 3
_SIZES = (17, 19, 23, 29, 31, 37)

# They check at run time what the export has proven.
_CHECKS = frozenset({
    "aten::_assert_tensor_metadata", "aten::sym_constrain_range", "aten::sym_constrain_range_for_size",
    "aten::_assert_scalar", "aten::_assert_async",
})  # fmt: skip
_FUNCTIONS: dict[Any, Any] = {
    torch.sym_max: builtins.max,
    torch.sym_min: builtins.min,
    torch.sym_float: builtins.float,
    torch.sym_int: builtins.int,
}
# Blocks of the graph that only say how it is to be run: here, without gradients and without autocast.
_BLOCKS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def exported(model: torch.nn.Module, example: Sequence[torch.Tensor], domains: Sequence[InputDomain]) -> Any:
    """The ``torch.export.ExportedProgram`` of ``model`` with a free batch and the domains' free dimensions.

    Raises:
        Exception: torch's, if the model depends on data or sizes, or cannot be exported.
    """
    inputs, shapes = export_inputs(example, domains)
    for name in ("torch.fx.experimental.symbolic_shapes", "torch.export"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)


def export_inputs(
    example: Sequence[torch.Tensor], domains: Sequence[InputDomain]
) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any], ...]]:
    """What to export with: inputs [3, ...] of unlike sizes, and of each the ``torch.export.Dim`` of its free ones."""
    sizes = _free_sizes(example, domains)
    shapes, inputs = [], []
    batch = torch.export.Dim("batch", min=1)
    dimensions: dict[str, Any] = {}
    for each, domain in zip(example, domains, strict=True):
        shape = list(each.shape[1:])
        dynamic: dict[int, Any] = {0: batch}
        for axis, name in free_names(domain):
            low, high = domain.sizes[axis]
            if name not in dimensions:
                dimensions[name] = torch.export.Dim(name, min=low, max=high)
            dynamic[axis + 1], shape[axis] = dimensions[name], sizes[name]
        item = each.new_empty([1, *shape])
        inputs.append(torch.cat([row[0] for row in batch_rows([item], [domain], _BATCH)]))
        shapes.append(dynamic)
    return tuple(inputs), tuple(shapes)


def free_names(domain: InputDomain) -> Iterator[tuple[int, str]]:
    """The free dimensions with a name each; those of one name have one size."""
    for position, axis in enumerate(domain.free):
        name = domain.same[position] if position < len(domain.same) else ""
        yield axis, f"size_{name}" if name.isidentifier() else f"size_{position}"


def _free_sizes(example: Sequence[torch.Tensor], domains: Sequence[InputDomain]) -> dict[str, int]:
    """A size for each free dimension, within its range."""
    ranges: dict[str, tuple[int, int]] = {}
    for domain in domains:
        for axis, name in free_names(domain):
            low, high = domain.sizes[axis]
            before = ranges.get(name, (1, 1 << 30))
            ranges[name] = max(low, before[0]), min(high if high is not None else 1 << 30, before[1])
    taken = {size for each in example for size in each.shape[1:]}
    sizes = {}
    for name, (low, high) in ranges.items():
        sizes[name] = next((size for size in _SIZES if low <= size <= high and size not in taken),
                           min(max(low + 1, 2), high))  # fmt: skip
        taken.add(sizes[name])
    return sizes


def script_of(program: Any) -> torch.jit.ScriptModule:
    """The exported program as TorchScript that takes and gives what the model does.

    Raises:
        Exception: there is something in it that TorchScript has no word for.
    """
    root = program.module()
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    _copy(root, root.graph.nodes, graph, values)
    output = next(node for node in root.graph.nodes if node.op == "output")
    leaves = [values[each] if isinstance(each, fx.Node) else each for each in output.args[0]]
    graph.output(_nested(program.module_call_graph[0].signature.out_spec, iter(leaves)))
    graph.lint()
    script: torch.jit.ScriptModule = torch.jit.script(fx.GraphModule(root, graph))
    return script


def _copy(root: torch.nn.Module, nodes: Iterable[fx.Node], graph: fx.Graph, values: dict[fx.Node, Any]) -> None:
    """Appends ``nodes`` to ``graph``; ``values`` says what became of each."""
    for node in nodes:
        if node.op == "output" or (node.op == "call_module" and str(node.target).startswith("_guards_fn")):
            continue
        name = str(getattr(node.target, "__name__", ""))
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            values[node] = _block(root, node, name, graph, values)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema.name
            if schema == "aten::sym_size":
                values[node] = graph.call_method("size", _mapped(node.args, values))
            elif schema not in _CHECKS:
                values[node] = graph.node_copy(node, values.__getitem__)
                values[node].target = node.target.overloadpacket
        elif node.target is operator.getitem and isinstance(_mapped(node.args[0], values), (tuple, list)):
            values[node] = operator.getitem(*_mapped(node.args, values))
        elif node.op == "get_attr" and isinstance(_attribute(root, str(node.target)), fx.GraphModule):
            values[node] = _attribute(root, str(node.target))
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].target = _FUNCTIONS.get(node.target, node.target)


def _block(root: torch.nn.Module, node: fx.Node, name: str, graph: fx.Graph, values: dict[fx.Node, Any]) -> Any:
    """The nodes of a block, in place of the call of it."""
    settings = [each for each in node.args if not isinstance(each, fx.Node)]
    arguments = [values[each] for each in node.args if isinstance(each, fx.Node)]
    if name not in _BLOCKS or True in settings:
        raise TypeError(f"{name} has no word in TorchScript")
    body = next(each for each in arguments if isinstance(each, fx.GraphModule))
    given = iter(each for each in arguments if each is not body)
    inner: dict[fx.Node, Any] = {each: next(given) for each in body.graph.nodes if each.op == "placeholder"}
    if any(each.op == "get_attr" for each in body.graph.nodes):
        raise TypeError(f"{name} holds tensors of its own")
    _copy(body, [each for each in body.graph.nodes if each.op != "placeholder"], graph, inner)
    output = next(each for each in body.graph.nodes if each.op == "output")
    return _mapped(output.args[0], inner)


def _mapped(value: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(each, values) for each in value)
    return values[value] if isinstance(value, fx.Node) else value


def _attribute(root: torch.nn.Module, target: str) -> Any:
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _nested(spec: Any, leaves: Iterator[Any]) -> Any:
    """The output's leaves in the structure that the model gave them: mappings become dicts, named tuples plain ones."""
    if spec.is_leaf():
        return next(leaves)
    children = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    parts = [_nested(child, leaves) for child in children]
    if issubclass(spec.type, list):
        return parts
    if issubclass(spec.type, tuple):
        return tuple(parts)
    names = spec.context
    if issubclass(spec.type, dict) and isinstance(names, (list, tuple)):
        names = names if all(isinstance(name, str) for name in names) else names[0]
        if len(names) == len(parts) and all(isinstance(name, str) for name in names):
            return dict(zip(names, parts, strict=True))
    raise TypeError(f"an output that is a {spec.type.__name__} has no word in TorchScript")
