"""What a model's Python code learns about its input while it is traced.

A trace has one path only. It is the model's for every input if no number of the input, and no size that may change,
ever became one of Python's: nothing could then have depended on it. The tracer warns of some such reads, not of all
(`range(x.shape[1])`, `torch.equal`).
"""

from __future__ import annotations

import types as python_types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# What they answer with is the same for every input of a model.
_ABOUT_KINDS = frozenset({
    "dim", "ndim", "ndimension", "is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg", "is_inference",
    "is_tensor", "is_same_size", "requires_grad", "requires_grad_", "element_size", "itemsize", "get_device", "device",
    "dtype", "layout", "is_leaf", "is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_cuda", "is_cpu",
    "is_mps", "is_xpu", "is_meta", "is_mkldnn", "is_shared", "grad", "grad_fn", "_grad", "retains_grad", "names",
    "has_names", "output_nr", "is_grad_enabled", "type", "__hash__", "can_cast", "result_type", "promote_types",
    "is_autocast_enabled", "get_autocast_dtype", "get_default_dtype", "is_storage", "size", "shape",
})  # fmt: skip
# They give code the numbers of a tensor, or how many there are in a whole batch.
_OF_DATA = frozenset({
    "__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "__len__", "__array__", "item",
    "tolist", "numpy", "equal", "allclose", "is_nonzero", "numel", "nelement",
})  # fmt: skip
_SPLITS = frozenset({
    "unbind", "split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "hsplit", "vsplit",
    "dsplit", "__iter__",
})  # fmt: skip


class ReadsWatch(TorchFunctionMode):
    """Watches calls of torch.

    Attributes:
        reads: names of the calls that gave the code a number that may depend on the input.
        splits: names of those that gave it a list of tensors, whose length may depend on a size.
        vocabularies: position of an input -> rows of the smallest table it was looked up in.
    """

    def __init__(self, inputs: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.splits: list[str] = []
        self.vocabularies: dict[int, int] = {}
        self._inputs = {each.data_ptr(): position for position, each in enumerate(inputs)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = _name(func)
        if name == "embedding" and len(args) > 1:
            self._looked_up(*args[:2])
        if name in _SPLITS:
            self.splits.append(name)
        elif name not in _ABOUT_KINDS and not _is_opaque(result):
            self.reads.append(name)
        return result

    @property
    def data_reads(self) -> list[str]:
        """Of `reads`, those of numbers in tensors, each once. While nothing is traced, sizes are plain numbers and not
        among them, but for the count of all numbers in a batch."""
        return sorted(_OF_DATA.intersection(self.reads))

    def _looked_up(self, ids: Any, table: Any) -> None:
        if not isinstance(ids, torch.Tensor) or not isinstance(table, torch.Tensor):
            return
        if ids.dim() < table.dim() and not table.is_floating_point():
            ids, table = table, ids  # torch.embedding has them the other way round
        position = self._inputs.get(ids.data_ptr())
        if position is not None and table.dim() == 2:
            self.vocabularies[position] = min(self.vocabularies.get(position, len(table)), len(table))


def _name(func: Callable[..., Any]) -> str:
    """``shape`` for the getter of Tensor.shape."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return str(name)


def _is_opaque(result: Any) -> bool:
    """Whether Python code cannot branch on it: a tensor, nothing, a dtype or a list of such."""
    if result is None or isinstance(result, (torch.Tensor, torch.dtype, torch.device, torch.layout)):
        return True
    if isinstance(result, (tuple, list)):
        return all(_is_opaque(each) for each in result)
    return isinstance(result, (torch.memory_format, python_types.NotImplementedType))
