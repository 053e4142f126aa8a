"""A lane that goes joins its workers; one of them may be in Python just then, and needs the interpreter to leave it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HANG_S = 120

# In a process of its own: a deadlock of two threads that wait for each other cannot be ended from within.
PROGRAM = """
import sys, threading
import torch
from torch import nn
from tests.support.lane_bench import LaneBench

is_called, may_end = threading.Event(), threading.Event()
may_end.set()
operators = torch.library.Library("lane_end", "DEF")
operators.define("wait(Tensor x) -> Tensor")

def wait(x):
    is_called.set()
    may_end.wait()
    return x * 2

operators.impl("wait", wait, "CompositeExplicitAutograd")

class Waits(nn.Module):
    def forward(self, x):
        return torch.ops.lane_end.wait(x)

torch.jit.trace(Waits(), torch.zeros(2, 4)).save(sys.argv[1])
bench = LaneBench(sys.argv[1], [torch.zeros(1, 4)])
may_end.clear()
is_called.clear()
bench.submit("one", torch.ones(1, 4))
assert is_called.wait(60)
lane, bench.lane = bench.lane, None
sys.setswitchinterval(1000)  # nobody takes the interpreter from this thread: it has to let go of it
may_end.set()
del lane
bench.drain()
assert torch.equal(bench.answers["one"], torch.full((4,), 2.0)), bench.answers
print("the end")
"""


@pytest.mark.slow
def test_a_lane_goes_while_a_worker_is_in_python(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "waits.pt")], capture_output=True, text=True, timeout=HANG_S,
        check=False,
    )  # fmt: skip
    assert ended.stdout == "the end\n", ended.stderr[-2000:]
