"""Models at a lower precision, made of those in fp32: what OpenVINO and AOTInductor compile.

All of them take and give fp32. Runs in the process that makes models for backends; nothing here is for a server.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from pyserve.backends.precision import Run, measure_agreement, precision_note, sums_overflow

Item = tuple[torch.Tensor, ...]
Progress = Callable[[str], None]

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Whether more care is needed is seen on so many items.
LADDER_ITEMS_MAX = 50

_ATEN = torch.ops.aten
# torchao finds what may be fused by the layer that a node came from. Where a model calls one layer several times, or
# was exported before, that is wrong or unknown; what the nodes are says it too.
_SOURCES: dict[Any, Any] = {
    _ATEN.conv2d.default: torch.nn.Conv2d,
    _ATEN.conv1d.default: torch.nn.Conv1d,
    _ATEN.linear.default: torch.nn.Linear,
    _ATEN.relu.default: torch.nn.ReLU,
    _ATEN.relu_.default: torch.nn.ReLU,
    _ATEN.add.Tensor: operator.add,
    _ATEN.add_.Tensor: operator.add,
    _ATEN.silu.default: torch.nn.SiLU,
    _ATEN.silu_.default: torch.nn.SiLU,
    _ATEN.gelu.default: torch.nn.GELU,
    _ATEN.tanh.default: torch.nn.Tanh,
    _ATEN.hardswish.default: torch.nn.Hardswish,
    _ATEN.hardswish_.default: torch.nn.Hardswish,
}

_HEAVY = frozenset({
    _ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default, _ATEN.linear.default, _ATEN.matmul.default,
    _ATEN.mm.default, _ATEN.bmm.default, _ATEN.addmm.default, _ATEN.scaled_dot_product_attention.default,
})  # fmt: skip


def without_telemetry() -> None:
    """Lets openvino and nncf find no package to tell their makers with that they are in use.

    REQUIRES: neither has been imported.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing it raises ImportError


def openvino_model(
    model: Any, precision: str, items: Sequence[Item], truth: Run, *, wanted: float,
    progress: Progress = lambda text: None,
) -> tuple[Any, str]:  # fmt: skip
    """An ``openvino.Model`` to be loaded at ``precision``, and a note about it.

    OpenVINO computes in bf16 and fp16 by itself where the CPU can. int8 is calibrated, with more care if the first way
    costs more than ``wanted`` allows.

    Args:
        model: an ``openvino.Model`` in fp32; it is left as it is.
        items: to calibrate with.
        truth: the model itself, in fp32.
        wanted: share of the items that should be answered alike, see `PrecisionAgreement.share`.

    Raises:
        Exception: NNCF's, of many classes.
    """
    note = precision_note("openvino", precision)
    if precision != "int8":
        return model, note
    some = items[:LADDER_ITEMS_MAX]
    found: list[tuple[float, Any]] = []
    for careful in (False, True):
        made = int8_openvino(model, items, progress, careful=careful)
        progress("comparing int8 with fp32")
        found.append((measure_agreement(truth, _runner(made), some).share, made))
        if found[-1][0] >= wanted:
            break
    made = max(found, key=lambda each: each[0])[1]
    if made is not found[0][1]:
        note = "; ".join(
            filter(None, [note, "calibrated with ranges that cut a few large numbers off, which costs less here"])
        )
    return made, note


def _runner(model: Any) -> Run:
    """Runs an ``openvino.Model`` for its outputs, in order."""
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.from_numpy(each) for each in compiled(tuple(each.numpy() for each in inputs)).values()]

    return run


def inductor_program(
    program: Any, precision: str, items: Sequence[Item], *, example: Sequence[torch.Tensor],
    export: Callable[[torch.nn.Module], Any], progress: Progress = lambda text: None,
) -> tuple[Any, str]:  # fmt: skip
    """A ``torch.export.ExportedProgram`` at ``precision`` that takes and gives what ``program`` does, and a note.

    Args:
        program: in fp32; it is left as it is.
        items: to calibrate int8 with.
        example: inputs that it takes.
        export: exports a module with the sizes that may change; the modules take what ``program`` does, in order.

    Raises:
        Exception: torch's and torchao's, of many classes.
    """
    note = precision_note("aotinductor", precision)
    if precision == "fp32":
        return program, note
    if precision == "int8":
        return export(int8_module(program, items, progress)), note
    module, is_partly = lowered_module(program, KINDS[precision], example)
    if is_partly:
        note = f"only convolutions, linear layers and products of matrices run at {precision}"
    return export(module), note


def int8_openvino(
    model: Any, items: Sequence[Item], progress: Progress = lambda text: None, *, careful: bool = False
) -> Any:
    """An ``openvino.Model`` whose layers compute in int8, by NNCF.

    Args:
        model: an ``openvino.Model`` in fp32; it is left as it is.
        items: to find the ranges of numbers with.
        careful: ranges are the mean of the items' and have an offset, and biases are corrected one by one, which takes
            longer. Else ranges hold all numbers of all items: right unless a few are much larger than the others.

    Raises:
        Exception: NNCF's.
    """
    without_telemetry()
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParameters, RangeEstimatorParametersSet

    nncf.set_log_level(40)  # errors

    def given(numbered: tuple[int, Item]) -> tuple[Any, ...]:
        number, item = numbered
        progress(f"calibrating ({number} of {len(items)})")
        return tuple(each.numpy() for each in item)

    advanced = nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.ENABLE if sums_overflow() else nncf.OverflowFix.DISABLE,
        activations_range_estimator_params=RangeEstimatorParameters()
        if careful
        else RangeEstimatorParametersSet.MINMAX,
    )
    return nncf.quantize(
        model.clone(),
        nncf.Dataset(list(enumerate(items, 1)), given),
        subset_size=len(items),
        preset=nncf.QuantizationPreset.MIXED if careful else None,
        target_device=nncf.TargetDevice.CPU,
        model_type=nncf.ModelType.TRANSFORMER if _attends(model) else None,
        fast_bias_correction=not careful,
        advanced_parameters=advanced,
    )


def _attends(model: Any) -> bool:
    """Whether it is a transformer: for those NNCF leaves the sums of attention in fp32, and evens out channels."""
    kinds = {each.get_type_name() for each in model.get_ops()}
    return "ScaledDotProductAttention" in kinds or {"MVN", "Softmax", "MatMul"} <= kinds


def int8_module(program: Any, items: Sequence[Item], progress: Progress = lambda text: None) -> fx.GraphModule:
    """The module of an exported program with its layers in int8, by torchao; to be exported again.

    Args:
        program: a ``torch.export.ExportedProgram`` in fp32; what it holds is copied.
        items: to find the ranges of numbers with.

    Raises:
        Exception: torchao's.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    module = program.module()
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in _SOURCES:
            node.meta["source_fn_stack"] = [(node.name, _SOURCES[node.target])]
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=sums_overflow()))
    prepared = prepare_pt2e(module, quantizer)
    with torch.no_grad():
        for number, item in enumerate(items, 1):
            progress(f"calibrating ({number} of {len(items)})")
            prepared(*(each.clone() for each in item))
    converted = convert_pt2e(prepared)
    assert isinstance(converted, fx.GraphModule)
    return converted


def lowered_module(program: Any, dtype: torch.dtype, example: Sequence[torch.Tensor]) -> tuple[fx.GraphModule, bool]:
    """The module of an exported program at ``dtype``, and whether it is that only in part; to be exported again.

    Numbers that are not fp32 (whole ones, flags, doubles) stay what they are: the model asked for them.

    Args:
        program: a ``torch.export.ExportedProgram`` in fp32.
        dtype: bfloat16 or float16.
        example: inputs that it takes; it is shown to run at ``dtype`` throughout, or else only convolutions, linear
            layers and products of matrices do.

    Raises:
        Exception: it runs in neither way.
    """
    for is_partly in (False, True):
        module = copy.deepcopy(program.module())  # else the program's own weights would change
        if is_partly:
            _put_operators_at(module, dtype)
        else:
            _put_at(module, dtype)
            _restore_outputs(module.graph)
        for node in [each for each in module.graph.nodes if each.target is _ATEN._assert_tensor_metadata.default]:
            module.graph.erase_node(node)  # says which kind a number had to be in fp32
        module.graph.lint()
        module.recompile()
        try:
            with torch.no_grad():
                module(*(each.clone() for each in example))
        except Exception:  # numbers of two kinds meet: some that are made within, and a weight
            if is_partly:
                raise
            continue
        return module, is_partly
    raise AssertionError


def _put_at(module: fx.GraphModule, dtype: torch.dtype) -> None:
    graph = module.graph
    for tensor in _tensors_of(module):
        if tensor.dtype == torch.float32:
            tensor.data = tensor.data.to(dtype)
    for node in list(graph.nodes):
        if node.op == "placeholder" and _is_float(node):
            with graph.inserting_after(node):
                lower = graph.call_function(_ATEN.to.dtype, (node, dtype))
            node.replace_all_uses_with(lower, delete_user_cb=lambda user, lower=lower: user is not lower)


def _put_operators_at(module: fx.GraphModule, dtype: torch.dtype) -> None:
    """Only the operators that most of the time is spent in, with conversions around each."""
    graph = module.graph
    for node in [each for each in graph.nodes if each.target in _HEAVY and _is_float(each)]:
        with graph.inserting_before(node):
            for given in node.all_input_nodes:
                if _is_float(given) or _is_weight(module, given):
                    node.replace_input_with(given, graph.call_function(_ATEN.to.dtype, (given, dtype)))
        with graph.inserting_after(node):
            plain = graph.call_function(_ATEN.to.dtype, (node, torch.float32))
        node.replace_all_uses_with(plain, delete_user_cb=lambda user, plain=plain: user is not plain)


def _restore_outputs(graph: fx.Graph) -> None:
    """What is given is fp32 where it was."""
    output = _output(graph)
    for node in {each for each in output.all_input_nodes if _is_float(each)}:
        with graph.inserting_before(output):
            plain = graph.call_function(_ATEN.to.dtype, (node, torch.float32))
        output.replace_input_with(node, plain)


def _output(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op == "output")


def _is_weight(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    value = operator.attrgetter(str(node.target))(module)
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
