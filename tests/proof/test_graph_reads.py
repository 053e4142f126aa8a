"""Programs that look at the numbers of a whole batch are found by their graph; those that look at sizes are not."""

# TorchScript reads the annotations of `forward`, and takes what has none for a tensor.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from pyserve.proof.graph_reads import program_reads

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Any(nn.Module):
    def forward(self, x):
        return x * 2 if bool((x == 7).any()) else x


class Equal(nn.Module):
    def forward(self, x, y):
        return x * 2 if torch.equal(x, y) else x


class Length(nn.Module):
    def forward(self, x):
        n = int(x.sum())
        return x[:, : n + 1]


class InALoop(nn.Module):
    """What is looked at came into the loop, and is made of the input in its second round only."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        seen = self.w
        total = x
        for _ in range(3):
            if bool(seen.sum() > 4):
                total = total + 1
            seen = x.sum()
        return total


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Any()

    def forward(self, x):
        return {"y": (self.inner(x + 1), x)}


class Sizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 3.0))
        self.norm = nn.BatchNorm1d(4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        y = self.lstm(x)[0]
        for t in range(x.size(1)):
            if x.dtype == torch.float32 and x.dim() == 3 and len(x) > 1:
                y = y + self.norm(x[:, t]).unsqueeze(1)
        if bool(self.scale.sum() > 2):  # the same for all requests
            y = y * 2
        return torch.where(x > 0, y, x)


class ScaledByAll(nn.Module):
    def forward(self, x):
        return x / torch.clamp(x.abs().max() / 1e5, min=1)


class CountsInAll(nn.Module):
    def forward(self, x):
        return x * (1 - (x == 100).any().float())


class OfEachItem(nn.Module):
    def forward(self, x):
        y = x.mean((1, 2)) + x.amax(2).amax(1) + torch.max(x, x * 2).sum(-1).sum(-1) + x.flatten(1).norm(2, 1)
        return y + x.flatten(1).max(1).values + x.flatten(1).argmax(1) + (x > 0).any(2).any(1)


READS = {
    Any: "aten::any of all, aten::Bool", Equal: "aten::equal", Length: "aten::sum of all, aten::Int",
    InALoop: "aten::sum of all, aten::Bool", Inner: "aten::any of all, aten::Bool", Sizes: "",
    ScaledByAll: "aten::max of all", CountsInAll: "aten::any of all", OfEachItem: "",
}  # fmt: skip


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("cls", READS)
def test_a_program_that_looks_at_numbers_is_found(cls: type[nn.Module], is_frozen: bool) -> None:
    program = torch.jit.script(cls().eval())
    file = io.BytesIO()
    torch.jit.save(torch.jit.freeze(program) if is_frozen else program, file)
    file.seek(0)
    assert set(program_reads(file).split(", ")) == set(READS[cls].split(", "))


def test_a_file_that_is_no_program_raises() -> None:
    with pytest.raises(Exception, match=r".+"):
        program_reads(io.BytesIO(b"no zip"))
