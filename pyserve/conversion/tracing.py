"""The trace of a model, and what the model's code asked about how it is being run while it ran.

The tracer makes a module of each of the model's parts, with a type of its own, so that weights can be changed
afterwards; freezing takes them apart again. For a network of some hundred parts that is most of the time of both.
A trace that is to be frozen therefore has no parts: weights are constants of its graph from the beginning. What is
recorded of the model's operators is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from pyserve.conversion.mode_questions import mode_questions


class InOne(torch.nn.Module):
    """A module without parts that computes what ``model`` does.

    Args:
        model: without state that its runs change; its parameters need no gradients, which no constant may.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.__dict__["_model"] = model  # not as a part
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.__dict__["_model"](*inputs)


def trace_watched(
    model: torch.nn.Module, inputs: Sequence[torch.Tensor], stack: ExitStack
) -> tuple[torch.jit.ScriptModule, set[str]]:
    """The trace, and what the model's code asked about how it is being run while it ran.

    Before it runs, torch makes a module for each of the model's: hundreds of thousands of calls of its own, each of
    which would be watched.

    Args:
        stack: ends the watching.
    """
    asked: set[str] | None = None

    def made(each: torch.nn.Module, _compilation_unit: Any) -> Any:
        nonlocal asked
        module = torch.jit.TopLevelTracedModule(each, _compilation_unit=_compilation_unit)
        asked = stack.enter_context(mode_questions())
        return module

    if torch._jit_internal.module_has_exports(model):  # a module that is made in another way
        asked = stack.enter_context(mode_questions())
    program = torch.jit.trace(model, tuple(inputs), check_trace=False, strict=False, _module_class=made)
    assert asked is not None
    return program, asked
