"""What a model at a lower precision costs: how far its answers agree with fp32's, and whether that is enough.

    bf16, fp16    TorchScript and AOTInductor: weights, inputs and what flows between them are of that kind. OpenVINO
                  computes in it where the CPU has instructions for it, else in fp32.
    int8          weights and what flows between layers are whole numbers, in ranges found on the archive's calibration
                  files: OpenVINO by NNCF, AOTInductor by torchao (`pyserve.backends.quantized`). Not in TorchScript.

Agreement is measured on the calibration files when a model is made, with the model that was made, and kept beside it.
"""

from __future__ import annotations

import importlib.util
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyserve.errors import JsonObject, ModelLoadError

# What precisionAgreementMin is where model-config.yaml does not say.
AGREEMENT_MIN = 0.99
INT8 = "int8"
# Linux's names of the CPU's instructions that OpenVINO computes in a kind with.
_INSTRUCTIONS = {"bf16": ("avx512_bf16", "amx_bf16", "avx_ne_convert"), "fp16": ("avx512_fp16", "amx_fp16", "fphp")}
# With which torch's kernels do, if only by way of fp32. Without them resnet18 takes 65 times as long in bf16.
_TORCHS_INSTRUCTIONS = {"bf16": ("avx512bw", "bf16"), "fp16": _INSTRUCTIONS["fp16"]}
# Those that multiply and add whole numbers of 8 bits without an overflow in between.
_WHOLE_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")

Run = Callable[[Sequence[Any]], Any]


def plain_precision(named: str | None) -> str:
    """What TorchScript runs at where model-config.yaml names this precision: int8 is made of the model in fp32."""
    return "fp32" if named in (None, INT8) else named


def why_not(backend: str, precision: str) -> str:
    """Why ``backend`` cannot run at ``precision`` here and what to do about it; ``""`` if it can."""
    if precision != INT8:
        return ""
    if backend == "torchscript":
        return (
            "TorchScript has no int8 that is calibrated: its quantisers change the model's Python code. Use 'backend: "
            "openvino' or 'backend: aotinductor', or 'auto', which tries both"
        )
    package, fix = {
        "openvino": ("nncf", "pip install openvino nncf"),
        "aotinductor": ("torchao", "pip install torchao"),
    }[backend]
    if importlib.util.find_spec(package) is None:
        return f"{package}, which makes int8 models for {backend}, is not installed: {fix}"
    return ""


def cpu_flags() -> frozenset[str]:
    """What Linux calls the instructions of this machine's first CPU; empty where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((each for each in text.splitlines() if each.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


def sums_overflow() -> bool:
    """Whether this CPU's products of int8 are added up in 16 bits, so that weights must keep to 7 bits."""
    return platform.machine() == "x86_64" and not cpu_flags() & set(_WHOLE_INSTRUCTIONS)


def precision_note(backend: str, precision: str) -> str:
    """What is special about ``precision`` on this machine; ``""`` if nothing is."""
    if backend == "openvino" and precision in _INSTRUCTIONS and not cpu_flags() & set(_INSTRUCTIONS[precision]):
        return f"this CPU has no instructions for {precision}, so OpenVINO computes in fp32"
    if backend == "torchscript" and precision in _TORCHS_INSTRUCTIONS:
        if cpu_flags() & set(_TORCHS_INSTRUCTIONS[precision]):
            return ""
        return (
            f"this CPU has no instructions for {precision}, in which torch may take many times as long as in fp32; "
            "take precision out of model-config.yaml for such machines, or say 'backend: openvino', which computes in "
            "fp32 there"
        )
    if precision == INT8 and sums_overflow():
        return "this CPU has no VNNI: weights keep to 7 bits, so that no sum of products overflows"
    return ""


@dataclass(frozen=True)
class PrecisionAgreement:
    """How far answers agree with fp32's on some items.

    Attributes:
        items: how many.
        top1: share of the rows whose largest score is that of the same class, from 0 to 1; None where no output is
            scores, [n, classes] of floating-point numbers.
        similarity: mean over the items of the cosine of the angle between both answers; 1 for the same ones.
        largest: difference of one number, relative to the largest number of its output in fp32.
        mean: difference of all numbers on average, relative to the same.
    """

    items: int
    top1: float | None
    similarity: float
    largest: float
    mean: float

    @property
    def share(self) -> float:
        """What precisionAgreementMin is about: ``top1``; ``similarity`` where there are no scores."""
        return self.similarity if self.top1 is None else self.top1

    def to_json(self) -> JsonObject:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> PrecisionAgreement:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not write."""
        top1 = found["top1"]
        return cls(int(found["items"]), None if top1 is None else float(top1), float(found["similarity"]),
                   float(found["largest"]), float(found["mean"]))  # fmt: skip

    def __str__(self) -> str:
        what = f"similarity {self.similarity:.4f}" if self.top1 is None else f"top-1 agreement {self.top1:.1%}"
        items = "1 item" if self.items == 1 else f"{self.items} items"
        return f"{what} on {items}, largest difference {self.largest:.1e}, mean {self.mean:.1e} (relative)"


def measure_agreement(
    plain: Run, fast: Run, items: Sequence[Sequence[Any]], progress: Callable[[int], None] = lambda count: None
) -> PrecisionAgreement:
    """How far ``fast`` agrees with ``plain``, item by item.

    Args:
        plain: the model in fp32. Both take tensors [1, ...] and give a tensor, or a tuple, list or dict of tensors.
        items: each a tuple of tensors; not empty.
        progress: called with the number of items that are done.

    Raises:
        ModelLoadError: the answers are not of one structure and shape.
        Exception: what the models raise.
    """
    import torch

    rows = same = numbers = 0
    similarity = total = largest = 0.0
    has_scores = False
    with torch.no_grad():
        for count, item in enumerate(items, 1):
            pair = _Pair(list(floats(plain([each.clone() for each in item]))),
                         list(floats(fast([each.clone() for each in item]))))  # fmt: skip
            scores = pair.scores
            if scores is not None:
                has_scores = True
                rows += scores[0].shape[0]
                same += int((scores[0].argmax(1) == scores[1].argmax(1)).sum())
            similarity += pair.similarity()
            largest = max(largest, pair.largest())
            total, numbers = total + pair.sum_of_differences(), numbers + pair.size
            progress(count)
    mean = total / max(1, numbers)
    return PrecisionAgreement(len(items), same / rows if has_scores else None, similarity / len(items), largest, mean)


class _Pair:
    """Two answers to one item, as their floating-point tensors."""

    def __init__(self, wanted: list[Any], got: list[Any]):
        if [each.shape for each in wanted] != [each.shape for each in got]:
            raise ModelLoadError(
                f"its answer is of shapes {[list(each.shape) for each in got]}, fp32's of "
                f"{[list(each.shape) for each in wanted]}"
            )
        self._wanted = [each.double() for each in wanted]
        self._got = [each.double() for each in got]
        self.size = sum(each.numel() for each in wanted)

    @property
    def scores(self) -> tuple[Any, Any] | None:
        for wanted, got in zip(self._wanted, self._got, strict=True):
            if wanted.dim() == 2 and wanted.shape[1] > 1:
                return wanted, got
        return None

    def similarity(self) -> float:
        import torch

        wanted, got = (torch.cat([each.flatten() for each in side] or [torch.ones(1, dtype=torch.float64)])
                       for side in (self._wanted, self._got))  # fmt: skip
        lengths = float(wanted.norm() * got.norm())
        if lengths == 0.0:  # both of nothing but zeros, or one of them
            return 1.0 if float(wanted.norm()) == float(got.norm()) else 0.0
        cosine = float(wanted @ got) / lengths
        return min(1.0, cosine) if math.isfinite(cosine) else 0.0

    def largest(self) -> float:
        worst = 0.0
        for wanted, got in zip(self._wanted, self._got, strict=True):
            if wanted.numel():
                apart = float((wanted - got).abs().max()) / _scale(wanted)
                worst = max(worst, apart if math.isfinite(apart) else math.inf)
        return worst

    def sum_of_differences(self) -> float:
        pairs = zip(self._wanted, self._got, strict=True)
        return sum(float((wanted - got).abs().sum()) / _scale(wanted) for wanted, got in pairs if wanted.numel())


def _scale(wanted: Any) -> float:
    return max(float(wanted.abs().max()), 1e-6)


def floats(output: Any) -> Iterator[Any]:
    """The floating-point tensors in an answer, in order; a dict's by its keys."""
    import torch

    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for key in sorted(output, key=str):
            yield from floats(output[key])
    elif isinstance(output, (tuple, list)):
        for each in output:
            yield from floats(each)


def check_agreement(
    label: str, backend: str, precision: str, agreement: PrecisionAgreement, minimum: float | None
) -> None:
    """That answers agree with fp32's as far as model-config.yaml asks for.

    Args:
        minimum: precisionAgreementMin; None for `AGREEMENT_MIN`.

    Raises:
        ModelLoadError: they do not; the text has the figures and what to do.
    """
    wanted = AGREEMENT_MIN if minimum is None else minimum
    if agreement.share >= wanted:
        return
    kind = "similarity to" if agreement.top1 is None else "top-1 agreement with"
    raise ModelLoadError(
        f"{label}: with 'precision: {precision}' on {backend} the {kind} fp32 is {agreement.share:.1%} on its "
        f"calibration files, less than precisionAgreementMin ({wanted:.0%}): {agreement}. Calibrate with more inputs "
        "that are like the requests to come, take precision out of model-config.yaml, or lower precisionAgreementMin "
        "there if that much is good enough"
    )
