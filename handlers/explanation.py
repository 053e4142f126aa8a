"""Integrated gradients: how much each number of an input has to do with the score of a class."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from pyserve.handler import InputError, PredictionException

STEPS = 15

# Steps of all items run together; more would need memory for as many sets of activations.
_RUN_SIZE_MAX = 16


def integrated_gradients(score: Callable[..., torch.Tensor], batch: torch.Tensor, target: int) -> torch.Tensor:
    """Attributions of the shape of ``batch``, against zeros, for class ``target``.

    Args:
        score: the model, or a function of one, from [n, ...] to scores [n, classes].

    Raises:
        PredictionException: captum is not installed, or the model gives no gradients; both with status 501.
        InputError: there is no class ``target``.
    """
    if importlib.util.find_spec("captum") is None:
        raise PredictionException("explanations need captum, which is not installed here; pip install captum", 501)
    method = importlib.import_module("captum.attr").IntegratedGradients(score)
    try:
        # In the form of a worker that has run predictions before: their inference mode must not reach here.
        with torch.inference_mode(False), torch.enable_grad():
            attributions = method.attribute(
                batch.detach().clone(), target=target, n_steps=STEPS, internal_batch_size=max(_RUN_SIZE_MAX, len(batch))
            )
    except torch.OutOfMemoryError:
        raise
    except (IndexError, AssertionError) as error:
        raise InputError(f"'target' is {target}, but the model's scores have no such class") from error
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no gradients"])[0][:200]
        raise PredictionException(
            f"explanations need gradients, which this model does not give ({reason}); pack an eager model with "
            "--model-file, or TorchScript that is neither frozen nor optimized for inference",
            501,
        ) from error
    result: torch.Tensor = attributions.detach()
    return result


def require_gradients(model: Any) -> torch.nn.Module:
    """``model`` itself, if its gradients can be had.

    Raises:
        PredictionException: it is compiled ahead of time or runs elsewhere, status 501.
    """
    if isinstance(model, torch.nn.Module):
        return model
    reason = "the model runs in native code" if model is None else f"a {type(model).__name__} has none"
    raise PredictionException(
        f"explanations need gradients: {reason}; serve an eager or TorchScript model with handler code of your own, "
        "which runs in worker processes",
        501,
    )
