"""Whether this process computes plainly: eagerly built models, no compiler, no optimisation of TorchScript.

So a request is run again by the audit. It is slower, and what everything else is compared with.
"""

from __future__ import annotations

import contextlib
import os

import torch

NICENESS = 10

_is_plain = False


def run_plainly() -> None:
    """From now on this process computes plainly, and only while no other one wants its CPU.

    Call it before a model is loaded, in the thread that will run it.
    """
    global _is_plain
    _is_plain = True
    os.nice(NICENESS)
    with contextlib.suppress(OSError):  # a container may forbid it; niceness does most of it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    # TorchScript is interpreted as it was written: no profiling, no fusion, nothing specialized on shapes.
    torch._C._set_graph_executor_optimize(False)


def is_plain() -> bool:
    """Whether `run_plainly` was called."""
    return _is_plain
