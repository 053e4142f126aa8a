"""OpenVINO's model of a program: converted, saved, compiled as the engine compiles it, and run for the comparison."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pyserve.backends.divisions import leaves_inexactly, rounds_down, steps_on_quotient
from pyserve.backends.exact_numbers import constants_beyond, rounded_sums
from pyserve.backends.openvino import cause_of
from pyserve.backends.precision import AGREEMENT_MIN
from pyserve.backends.quantized import openvino_model, without_telemetry
from pyserve.backends.sources import Source, UnsuitableError
from pyserve.backends.table import BACKENDS, OPENVINO

# Inputs and outputs of these only: whole numbers are computed in 32 bits or as fp32, which `exact_numbers` makes
# the same.
_DTYPES = (torch.float32, torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool)
# Operators that may leave the whole numbers which it has, although their inputs are within them.
_GROWING = (
    "mul", "pow", "prod", "cumprod", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "lshift",
    "bitwise_left_shift", "square", "dot", "linear", "addcmul",
)  # fmt: skip
# Operators that wrap around in kinds of 8 bits, where OpenVINO stops at the largest number.
_WRAPPING = ("add", "sub", "rsub", "neg", "mul", "abs", "square", "pow", "lshift", "bitwise_left_shift")
_NARROW = (torch.uint8, torch.int8, torch.int16)
_CASTS = ("to", "to_copy", "type_as", "long", "int", "short", "char", "byte")
# Where torch gives on NaN, or takes it for true, and OpenVINO the other number, or false. Beside these there are
# kernels that are common to both; the engine looks for those (csrc/finite_flow.cpp).
_CHOOSING = (
    "max", "min", "amax", "amin", "aminmax", "maximum", "minimum", "fmax", "fmin", "argmax", "argmin", "topk", "sort",
    "argsort", "median", "kthvalue", "cummax", "cummin", "clip", "logical_not", "logical_and", "logical_or",
    "logical_xor", "any", "all", "count_nonzero", "bucketize", "searchsorted",
)  # fmt: skip
# Parts of names of the kernels that do likewise.
_CUTTING_OFF = ("relu", "pool", "hard", "clamp", "elu", "nan_to_num")
# Operators that make NaN or infinity of ordinary numbers.
_ODD = (
    "div", "true_divide", "divide", "reciprocal", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt",
    "rsqrt", "pow", "float_power", "acos", "asin", "arccos", "arcsin", "acosh", "atanh", "cosh", "sinh", "tan", "fmod",
    "remainder", "logit", "xlogy", "special_xlogy", "erfinv", "special_erfinv", "logsumexp", "norm",
    "linalg_vector_norm", "linalg_norm", "var", "std", "lgamma", "digamma", "prod", "cumprod", "square",
    "cosine_similarity",
)  # fmt: skip
# More numbers of an item than that are summed one after the other there, and in pairs by torch: where they cancel each
# other out, roundings of a million differed by more than 1e-4 of the sum.
_SUMMED_MAX = 1 << 16
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}


def make(source: Source, folder: Path, precision: str) -> Callable[[Sequence[torch.Tensor]], list[Any]]:
    """Writes ``model.xml`` and ``model.bin`` to ``folder``.

    Returns:
        what answers as the model does: the parts of its output, in order.

    Raises:
        UnsuitableError: it cannot be made; the text says why.
    """
    openvino = quiet_openvino()
    program = source.program()
    _check(program)
    if problem := rounded_sums(program, source.domains):
        raise UnsuitableError(problem)
    if constants_beyond(program):
        raise UnsuitableError("it has whole numbers above 2^24 of its own, which OpenVINO may round")
    try:
        model = openvino.convert_model(program)
    except Exception as error:  # of many classes
        raise UnsuitableError(f"OpenVINO cannot convert it: {_cause(error)}") from error
    if len(model.inputs) != len(source.example):
        raise UnsuitableError(f"OpenVINO's model takes {len(model.inputs)} inputs, the model {len(source.example)}")
    _fix_sizes(openvino, model, source)
    model = _at(model, source, precision)
    path = folder / BACKENDS[OPENVINO].file
    openvino.save_model(model, str(path), compress_to_fp16=False)
    del model
    try:
        compiled = openvino.Core().compile_model(
            str(path), "CPU",
            {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": torch.get_num_threads(),
             "INFERENCE_PRECISION_HINT": _HINTS[precision]},
        )  # fmt: skip
    except Exception as error:
        raise UnsuitableError(f"OpenVINO cannot compile it: {_cause(error)}") from error

    def run(inputs: Sequence[torch.Tensor]) -> list[Any]:
        results = compiled([each.contiguous().numpy() for each in inputs])
        return [torch.from_numpy(results[output].copy()) for output in compiled.outputs]

    return run


def _fix_sizes(openvino: Any, model: Any, source: Source) -> None:
    """Writes the proven sizes into the model: its converter makes every dimension a free one, and then nobody checks
    them, though kernels read as many numbers as the weights have."""  # fmt: skip
    shapes = {
        port: openvino.PartialShape([
            openvino.Dimension(-1), *(openvino.Dimension(low, -1 if high is None else high)
                                      for low, high in domain.sizes)
        ])
        for port, domain in zip(model.inputs, source.domains, strict=True)
    }  # fmt: skip
    try:
        model.reshape(shapes)
    except Exception as error:
        raise UnsuitableError(f"OpenVINO cannot give its inputs their sizes: {_cause(error)}") from error


def _at(model: Any, source: Source, precision: str) -> Any:
    wanted = source.archive.config.precision_agreement_min
    try:
        made, note = openvino_model(
            model, precision, source.items, source.run, wanted=AGREEMENT_MIN if wanted is None else wanted,
            progress=source.progress,
        )  # fmt: skip
    except Exception as error:  # NNCF's, of many classes
        raise UnsuitableError(f"NNCF cannot make it {precision}: {_cause(error)}") from error
    source.notes += [note] if note else []
    return made


def quiet_openvino() -> Any:
    """The package, which then has nothing to send statistics with; for processes of ours that end soon."""
    without_telemetry()
    return importlib.import_module("openvino")


def _check(program: Any) -> None:
    """That OpenVINO's processor plugin computes it as torch does, as far as numbers go.

    Raises:
        UnsuitableError: it would compute in fewer bits, or in a way that probes cannot cover.
    """
    if hiding := _hides_nan(program):
        raise UnsuitableError(f"NaN may come up within the model ({hiding}), which OpenVINO would hide")
    if _hides_masked_rows(program):
        raise UnsuitableError(
            "rows of its attention may be masked wholly, which are NaN in OpenVINO, and it would hide them"
        )
    for node in program.graph.nodes:
        if _operator(node) in ("atan2", "arctan2"):
            raise UnsuitableError(
                "it takes the angle of two numbers (atan2), which OpenVINO does otherwise for tiny ones"
            )
        if any(isinstance(each, float) and 0 < abs(each) < torch.finfo(torch.float32).tiny for each in node.args):
            raise UnsuitableError("its code has a number that is too small for OpenVINO, which takes it for zero")
        if (count := _summed(node)) > _SUMMED_MAX:
            raise UnsuitableError(f"it sums {count} numbers at once, which OpenVINO rounds otherwise than torch")
        if isinstance(node.target, torch._ops.HigherOrderOperator) and "cond" in str(node.target):
            raise UnsuitableError("its code takes another branch for other numbers, which OpenVINO is not given")
        value = node.meta.get("val")
        for each in value if isinstance(value, (tuple, list)) else [value]:
            if not isinstance(each, torch.Tensor):
                continue
            if each.dtype is torch.float64 or each.dtype.is_complex:
                raise UnsuitableError(f"it computes in {_name(each.dtype)}, OpenVINO in float32")
            if node.op == "placeholder" and node.name in program.graph_signature.user_inputs:
                if each.dtype not in _DTYPES:
                    raise UnsuitableError(f"OpenVINO takes no input of {each.dtype}")
            elif each.dtype in (torch.int64, torch.int32) and _grows(node):
                raise UnsuitableError("it multiplies whole numbers, of which OpenVINO has fewer than torch")
            elif each.dtype in _NARROW and _operator(node) in _WRAPPING:
                raise UnsuitableError(f"it counts in {_name(each.dtype)}, which ends elsewhere in OpenVINO")
            elif (each.is_floating_point() and leaves_inexactly(node)) or _steps(node, each):
                raise UnsuitableError("it asks how often one number goes into another, which OpenVINO rounds otherwise")
            elif each.dtype in (torch.int64, torch.int32) and rounds_down(node):
                raise UnsuitableError("it rounds quotients of whole numbers down, OpenVINO towards zero")
    if dtype := _computes_in_half(program):
        raise UnsuitableError(f"it computes in {dtype}, OpenVINO in float32")
    if name := _places_of_equal_numbers(program):
        raise UnsuitableError(
            f"it asks where numbers stand ({name}), of which OpenVINO takes others where some are equal"
        )
    if cast := _open_cast(program):
        raise UnsuitableError(f"it makes {cast}, which OpenVINO does otherwise for large ones")


def _hides_nan(program: Any) -> str:
    """The operator whose NaN or infinity comes to one that chooses among numbers, and may not choose it; ``""`` if none
    does."""  # fmt: skip
    inputs = set(program.graph_signature.user_inputs)
    origins: dict[Any, str] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = _operator(node)
        origin = next((origins[each] for each in node.all_input_nodes if each in origins), "")
        if origin and (name in _CHOOSING or _casts_to_whole(node, name)):
            return origin
        if not origin and (_divides_by_weights(node, name, inputs) or not (name in _ODD or _brings_infinity(node))):
            continue
        value = node.meta.get("val")
        parts = value if isinstance(value, (tuple, list)) else [value]
        if any(isinstance(each, torch.Tensor) and each.is_floating_point() for each in parts):
            origins[node] = origin or name
    return ""


def _hides_masked_rows(program: Any) -> bool:
    """Whether an attention's rows come to the outputs by operators alone that do not give NaN on.

    Where a mask of the input's leaves nothing to attend to, torch gives zeros and OpenVINO NaN. An answer with NaN goes
    to TorchScript; so nothing is hidden where a sum that goes around such operators still has it, as in a transformer.
    """
    inputs = set(program.graph_signature.user_inputs)
    asked: set[Any] = set()  # nodes that come from an input
    rows: list[Any] = []
    for node in program.graph.nodes:
        if (node.op == "placeholder" and node.name in inputs) or not asked.isdisjoint(node.all_input_nodes):
            asked.add(node)
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        is_masked = _operator(node) == "scaled_dot_product_attention" and mask in asked
        if is_masked and mask.meta["val"].dtype is torch.bool:
            rows.append(node)
    return any(not _shows(node) for node in rows)


def _shows(node: Any) -> bool:
    """Whether its NaN comes to an output."""
    seen, left = {node}, [node]
    while left:
        for user in left.pop().users:
            if user.op == "output":
                return True
            name = _operator(user)
            if user not in seen and name not in _CHOOSING and not any(part in name for part in _CUTTING_OFF):
                seen.add(user)
                left.append(user)
    return False


def _computes_in_half(program: Any) -> str:
    """The kind of 16 bits that numbers of an input are cast to and used in; ``""`` if none are. OpenVINO leaves such
    casts out, and its kernels have been seen to write beyond their memory."""  # fmt: skip
    inputs = set(program.graph_signature.user_inputs)
    asked: set[Any] = set()
    for node in program.graph.nodes:
        if (node.op == "placeholder" and node.name in inputs) or not asked.isdisjoint(node.all_input_nodes):
            asked.add(node)
        dtype = getattr(node.meta.get("val"), "dtype", None)
        if node in asked and dtype in (torch.float16, torch.bfloat16) and any(_operator(each) for each in node.users):
            return _name(dtype)
    return ""


def _steps(node: Any, value: torch.Tensor) -> bool:
    """Floating-point division alone: of whole numbers OpenVINO divides as torch does, but towards zero."""
    is_whole = _operator(node) in ("floor_divide", "div") and not value.is_floating_point()
    return not is_whole and steps_on_quotient(node)


def _casts_to_whole(node: Any, name: str) -> bool:
    """Of NaN torch makes the smallest whole number, or zero."""
    dtype = getattr(node.meta.get("val"), "dtype", None)
    return name in _CASTS and isinstance(dtype, torch.dtype) and not dtype.is_floating_point


def _open_cast(program: Any) -> str:
    """Numbers of an input that are cast to a kind which may not hold them, in words; ``""`` if there are none."""
    inputs = set(program.graph_signature.user_inputs)
    derived = set()  # nodes whose numbers come from an input; sizes do not count
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in inputs:
            derived.add(node)
        if node.op != "call_function" or isinstance(value, (int, torch.SymInt)):
            continue
        if derived.isdisjoint(node.all_input_nodes):
            continue
        derived.add(node)
        before = node.args[0].meta.get("val") if node.args and hasattr(node.args[0], "meta") else None
        if not isinstance(value, torch.Tensor) or not isinstance(before, torch.Tensor) or value.dtype == before.dtype:
            continue
        if _operator(node) not in _CASTS or value.is_floating_point() or torch.bool in (before.dtype, value.dtype):
            continue
        if (before.is_floating_point() or value.dtype in _NARROW) and not _is_bounded(node.args[0], value.dtype):
            return f"{_name(value.dtype)} of {_name(before.dtype)}"
    return ""


def _is_bounded(node: Any, dtype: torch.dtype) -> bool:
    """Whether its numbers stay between two that the code names and ``dtype`` and 32 bits have; it may round them."""
    while _operator(node) in ("round", "floor", "ceil", "trunc") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if _operator(node) not in ("clamp", "hardtanh", "clip"):
        return False
    ends = [each for each in node.args[1:] if isinstance(each, (int, float))]
    held = torch.iinfo(torch.int32 if dtype is torch.int64 else dtype)
    return len(ends) == 2 and held.min <= min(ends) and max(ends) <= held.max


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _divides_by_weights(node: Any, name: str, inputs: set[str]) -> bool:
    """Or by a number, or raises to a positive power: by nothing that an input makes zero."""
    if name not in ("div", "true_divide", "divide", "remainder", "fmod", "pow", "square"):
        return False
    second: Any = node.args[1] if len(node.args) > 1 else 2
    if not hasattr(second, "op"):
        # Ordinary numbers end at 1e6; their squares and cubes stay far from infinity.
        return second != 0 if name not in ("pow", "square") else second in (1, 2, 3)
    return name != "pow" and second.op == "placeholder" and second.name not in inputs


def _places_of_equal_numbers(program: Any) -> str:
    """The operator whose order among equal numbers nobody promises, if its places are used; ``""`` if none are."""
    for node in program.graph.nodes:
        name = _operator(node)
        is_stable = "stable" in str(node.target) and node.kwargs.get("stable")
        if name == "argsort" and not is_stable:
            return name
        if name == "topk" or (name == "sort" and not is_stable):
            places = [each for each in node.users if each.args[1:] == (1,)]
            if any(each.users for each in places):
                return name
    return ""


def _brings_infinity(node: Any) -> bool:
    return any(isinstance(each, float) and not math.isfinite(each) for each in node.args)


def _operator(node: Any) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).removeprefix("aten::").strip("_") if schema is not None else ""


def _summed(node: Any) -> int:
    """How many floating-point numbers of an item are summed into one; 0 if none are. Free sizes count as one."""
    if _operator(node) not in ("sum", "mean", "cumsum"):
        return 0
    given, value = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    if not isinstance(given, torch.Tensor) or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return 0
    if _operator(node) == "cumsum":
        size = given.shape[node.args[1]] if given.dim() else 1
        return size if isinstance(size, int) else 1
    before, after = (math.prod(size for size in each.shape if isinstance(size, int)) for each in (given, value))
    return int(before // max(1, after))


def _grows(node: Any) -> bool:
    """Whether it multiplies whole numbers, neither of which comes from a mask."""
    if _operator(node) not in _GROWING:
        return False
    return not any(_is_mask(each) for each in node.all_input_nodes)


def _is_mask(node: Any) -> bool:
    """Whether it is a cast of a bool tensor."""
    before = node.all_input_nodes[0].meta.get("val") if node.all_input_nodes else None
    own = node.meta.get("val")
    return any(getattr(each, "dtype", None) is torch.bool for each in (before, own))


def _cause(error: Exception) -> str:
    return cause_of(str(error))[:300] or type(error).__name__
