"""Builds a model without filling its parameters with random numbers, and knows whether that could be noticed.

Memory is *stale* while it may hold other numbers than a plain build would have put there: what a skipped fill left,
what was drawn from torch's generator (whose stream skipping moves), and everything computed from such numbers. Filling
in the weights makes memory right again, or leaves it to nobody. So the short way was true exactly if, at the end, no
stale memory is alive; a stale number that becomes a number of Python's ends the attempt.

Every operator passes by here (a dispatch mode), whoever calls it: the model's constructor, torch's own layers, hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What fills tensors with random numbers. Those of torch.nn.init that are not here end in one of the first two.
_RANDOM_FILLS = frozenset(
    {
        torch.Tensor.uniform_,
        torch.Tensor.normal_,
        torch.nn.init.uniform_,
        torch.nn.init.normal_,
        torch.nn.init.kaiming_uniform_,
        torch.nn.init.kaiming_normal_,
    }
)
# Methods that hand a tensor's memory or numbers to something that is not an operator.
_WAYS_OUT = frozenset({
    "numpy", "tolist", "storage", "_typed_storage", "untyped_storage", "data_ptr", "is_set_to",
    "__array__", "__dlpack__", "__reduce_ex__", "__deepcopy__", "__repr__", "__format__",
})  # fmt: skip
# Operators that overwrite their first argument without looking at it.
_OVERWRITES = frozenset({"aten::copy_", "aten::fill_", "aten::zero_"})
# Operators that answer about a tensor's kind, not about its numbers.
_ABOUT_KINDS = frozenset({
    "aten::_has_compatible_shallow_copy_type", "aten::is_same_size", "aten::_has_same_storage_numel", "aten::is_pinned",
})  # fmt: skip


class StaleNumberUsedError(BaseException):
    """A stale number became one of Python's, so that anything may have come of it; even a loop without an end.

    Not an Exception, because a constructor may catch those.
    """


class StaleMemory:
    """Which memory is stale."""

    def __init__(self) -> None:
        self._unfilled: set[int] = set()
        # A weak reference keeps a storage's address from being used again.
        self._storages: dict[int, StorageWeakRef] = {}

    def __contains__(self, tensor: torch.Tensor) -> bool:
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self._storages

    def add(self, tensor: torch.Tensor) -> None:
        storage = _storage(tensor)
        if storage is None:
            raise StaleNumberUsedError("a tensor without memory of its own holds random numbers")
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = StorageWeakRef(storage)

    def leave_unfilled(self, tensor: torch.Tensor) -> bool:
        """Whether a random fill of ``tensor``, a parameter or its ``.data``, may be left out; it is stale then."""
        storage = _storage(tensor)
        if storage is None or not (isinstance(tensor, torch.nn.Parameter) or storage._cdata in self._unfilled):
            return False
        self.add(tensor)
        self._unfilled.add(storage._cdata)
        return True

    def overwritten(self, tensor: torch.Tensor) -> None:
        """``tensor`` holds right numbers now. Its memory does if it has all of it."""
        storage = _storage(tensor)
        if storage is not None and tensor.numel() * tensor.element_size() == storage.nbytes():
            self._storages.pop(storage._cdata, None)
            self._unfilled.discard(storage._cdata)

    def is_alive(self) -> bool:
        return any(not storage.expired() for storage in self._storages.values())


class SkipRandomFill(TorchFunctionMode):
    """Inside this context, random fills of parameters leave the memory as it is; everything else runs.

    Raises:
        StaleNumberUsedError: inside of it, where a number is used that is not what it would have been.
    """

    def __init__(self, stale: StaleMemory | None = None) -> None:
        super().__init__()
        self.stale = stale if stale is not None else StaleMemory()
        self._operators = _Operators(self.stale)

    def __enter__(self) -> SkipRandomFill:
        super().__enter__()
        self._operators.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._operators.__exit__(*error)
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._operators.is_looking:
            return func(*args, **kwargs)
        # A generator of the model's own has a stream of its own, which nothing may be left out of.
        if func in _RANDOM_FILLS and kwargs.get("generator") is None:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, torch.Tensor) and self.stale.leave_unfilled(target):
                return target
        name = getattr(func, "__name__", "")
        if name in _WAYS_OUT and any(tensor in self.stale for tensor in _tensors((args, kwargs))):
            raise StaleNumberUsedError(f"{name} of random numbers")
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    """Follows stale numbers through the operators."""

    def __init__(self, stale: StaleMemory) -> None:
        super().__init__()
        self.stale = stale
        self.is_looking = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler on the first operator, which takes longer than any constructor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.is_looking = True
        try:
            name = func._schema.name
            sources = args[1:] if name in _OVERWRITES else args
            reads = any(tensor in self.stale for tensor in _tensors((sources, kwargs)))
            result = func(*args, **kwargs)
            if reads or _draws(func, kwargs):
                self._spread(func, name, args, kwargs, result)
            elif name in _OVERWRITES:
                self.stale.overwritten(args[0])
            return result
        finally:
            self.is_looking = False

    def _spread(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        written = [
            kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None
            for place in _written(func)
        ]
        for tensor in _tensors((written, result)):
            self.stale.add(tensor)
        if name not in _ABOUT_KINDS and any(isinstance(each, (bool, int, float, complex)) for each in _leaves(result)):
            raise StaleNumberUsedError(f"{func} of random numbers")


def _draws(func: Any, kwargs: Mapping[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    generator = kwargs.get("generator")
    return generator is None or generator is torch.default_generator


@functools.lru_cache(maxsize=1024)
def _written(func: Any) -> tuple[int | str, ...]:
    arguments = func._schema.arguments
    return tuple(
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError, ValueError):  # sparse ones, parameters without a shape yet
        return None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _leaves(each)
    else:
        yield value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (each for each in _leaves(value) if isinstance(each, torch.Tensor))
