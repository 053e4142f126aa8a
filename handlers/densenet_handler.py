"""Tensors in and out as torch.save writes them, for clients that are torch programs themselves."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch

from pyserve.context import Context
from pyserve.handler import HandlerError, InputError
from pyserve.handlers.base_handler import BaseHandler
from pyserve.handlers.rows import found, row_value
from pyserve.handlers.tensor_spec import TensorSpec, dtype_name


class DenseNetHandler(BaseHandler):
    """Any model from [n, ...] to [n, ...]; a row is a whole tensor that torch.save wrote, and so is its answer."""

    sample_kind = "saved tensor"

    def prepare(self, context: Context) -> None:
        """As of every handler. ModelLoadError if model-config.yaml describes an input that is none."""
        super().prepare(context)
        if type(self) is DenseNetHandler and self.model_yaml_config.get("input") is not None:
            self._spec = TensorSpec.from_config(self.model_yaml_config)

    def preprocess(self, data: Sequence[Any]) -> Any:
        """Rows -> their tensors on the handler's device.

        Raises:
            InputError: a row is not a tensor that torch.save wrote, or not what model-config.yaml describes.
        """
        tensors = [_tensor(row_value(row)) for row in data]
        for tensor in tensors if self._spec is not None else ():
            self._check(tensor)
        return [tensor.to(self.get_device()) for tensor in tensors]

    def _check(self, tensor: torch.Tensor) -> None:
        assert self._spec is not None
        if tensor.dtype is not self._spec.torch_dtype or tensor.layout is not torch.strided or not tensor.dim():
            kind = f"a tensor of {dtype_name(tensor.dtype)} {list(tensor.shape)}"
            raise InputError(f"{self._spec.wanted} in a tensor [items, ...], got {kind}")
        self._spec.check(tensor)

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's output for each tensor. Tensors [k, channels, height, width] that fit together run as one."""
        if isinstance(data, torch.Tensor):
            return super().inference(data, *args, **kwargs)
        fit = all(each.dim() == 4 and each.shape[1:] == data[0].shape[1:] and each.dtype == data[0].dtype
                  for each in data)  # fmt: skip
        if len(data) > 1 and fit:
            sizes = [len(each) for each in data]
            output = super().inference(torch.cat(data), *args, **kwargs)
            if isinstance(output, torch.Tensor) and output.dim() and len(output) == sum(sizes):
                return list(output.split(sizes))
        return [_kept(super(DenseNetHandler, self).inference(each, *args, **kwargs)) for each in data]

    def postprocess(self, data: Any) -> list[Any]:
        """One tensor per row, on the CPU, with memory of its own.

        Raises:
            HandlerError: the model's output is not a tensor.
        """
        odd = next((each for each in data if not isinstance(each, torch.Tensor)), None)
        if odd is not None:
            raise HandlerError(f"densenet_handler needs a tensor from the model, got a {type(odd).__name__}")
        # torch.save writes all of the memory that a tensor is a part of, and so would send the whole batch.
        return [each.detach().clone().cpu() for each in data]


def _kept(output: Any) -> Any:
    """An output that the model's next call cannot change, should it be the model's own memory."""
    return output.clone() if isinstance(output, torch.Tensor) else output


def _tensor(value: Any) -> torch.Tensor:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise InputError(f"expected a tensor as torch.save writes it, got {found(value)}")
    try:
        tensor = torch.load(io.BytesIO(value), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"expected a tensor as torch.save writes it and nothing else, got {found(value)}") from error
    except MemoryError:
        raise
    except Exception as error:
        # torch's reader raises errors of many classes on other files; whatever it was, the request is at fault.
        raise InputError(f"expected a tensor as torch.save writes it, got {found(value)}") from error
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"expected a tensor as torch.save writes it, got {found(tensor)}")
    return tensor
