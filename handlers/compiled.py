"""The call of torch.compile that ``pt2`` in model-config.yaml asks for."""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Mapping
from typing import Any

import torch

from pyserve.handler import ModelLoadError
from pyserve.handlers.compile_arguments import compile_arguments

log = logging.getLogger(__name__)

# TorchServe's list. Not every torch has each of them, and a torch may have more.
PT2_BACKENDS = (
    "eager", "aot_eager", "inductor", "nvfuser", "aot_nvfuser", "aot_cudagraphs", "ofi", "fx2trt", "onnxrt", "ipex",
    "torchxla_trace_once", "openvino", "tensorrt", "hpu_backend",
)  # fmt: skip

# Backends that come with a package, which registers them when it is imported.
_PACKAGES = {"tensorrt": "torch_tensorrt", "ipex": "intel_extension_for_pytorch", "openvino": "openvino.torch"}


def check_backend(backend: str) -> None:
    """Checks that torch.compile has this backend here.

    Raises:
        ModelLoadError: it has not; the text names those it has.
    """
    dynamo = importlib.import_module("torch._dynamo")  # takes a second, and is needed only here
    if backend in _PACKAGES:
        try:
            importlib.import_module(_PACKAGES[backend])
        except ImportError as error:
            raise ModelLoadError(
                f"'pt2' in model-config.yaml asks for backend {backend!r}, which comes with {_PACKAGES[backend]}; "
                f"importing that failed: {error}"
            ) from error
    available = dynamo.list_backends(exclude_tags=())
    if backend in available:
        return
    nearest = difflib.get_close_matches(backend, available, n=1)
    known = "is not part of this torch" if backend in PT2_BACKENDS else "does not exist"
    fix = f", did you mean {nearest[0]!r}?" if nearest and backend not in PT2_BACKENDS else "."
    raise ModelLoadError(
        f"'pt2' in model-config.yaml asks for backend {backend!r}, which {known}{fix} "
        f"Backends here: {', '.join(sorted(available))}."
    )


def compiled(model: Any, config: Mapping[str, Any], name: str) -> Any:
    """``model`` as ``pt2`` in ``config`` asks for it; compilation itself happens when it first runs.

    Raises:
        ModelLoadError: ``pt2`` cannot be understood, or names a backend that is not here.
    """
    arguments = compile_arguments(config)
    if arguments is None:
        return model
    if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, torch.nn.Module):
        log.warning("model %s: 'pt2' in model-config.yaml compiles eager models; this one runs as it is", name)
        return model
    backend = arguments.get("backend", "inductor")
    if not isinstance(backend, str):
        raise ModelLoadError(f"'pt2' in model-config.yaml has backend {backend!r}; write its name")
    check_backend(backend)
    try:
        model = torch.compile(model, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelLoadError(f"'pt2' in model-config.yaml: torch.compile refuses {arguments}: {error}") from error
    log.info("model %s is compiled with %s", name, arguments or "torch.compile's defaults")
    return model
