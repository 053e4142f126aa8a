"""Leaving out random initialisation makes the model that building and copying makes, or is not done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pyserve.handlers import eager
from pyserve.handlers.eager import load_eager_model
from pyserve.proof.comparison import difference

SHORT = {
    "layers": """
        self.a = nn.Conv1d(1, 4, 2); self.b = nn.BatchNorm1d(4); self.c = nn.Linear(4 * 3, 3)
    def forward(self, x): return self.c(self.b(self.a(x[:, None])).flatten(1))
    """,
    "layers of a transformer, which are copies of one": """
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.a = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    def forward(self, x): return self.a(x[:, None])[:, 0]
    """,
    "filled through .data": """
        self.a = nn.Linear(4, 4); self.a.weight.data.normal_(mean=0.0, std=0.02); self.a.bias.data.zero_()
    def forward(self, x): return self.a(x)
    """,
    "scaled, cut and masked in place": """
        self.a = nn.Linear(4, 4); nn.init.orthogonal_(self.a.weight); self.e = nn.Embedding(9, 4, padding_idx=0)
        with torch.no_grad():
            self.a.weight.mul_(3).clamp_(-1, 1)
    def forward(self, x): return self.a(x) + self.e.weight[0]
    """,
    "a layer that is replaced": """
        self.a = nn.Linear(4, 9); self.a = nn.Linear(4, 4)
    def forward(self, x): return self.a(x)
    """,
    "one matrix under two names": """
        self.e = nn.Embedding(10, 4); self.h = nn.Linear(4, 10, bias=False); self.h.weight = self.e.weight
    def forward(self, x): return self.h(x)
    """,
    "drawn numbers that the file replaces": """
        self.w = nn.Parameter(torch.randn(4, 4)); self.register_buffer("r", torch.randn(4))
    def forward(self, x): return x @ self.w + self.r
    """,
    "a buffer that is made of whole numbers": """
        self.a = nn.Linear(4, 4); self.register_buffer("i", torch.arange(4).flip(0), persistent=False)
    def forward(self, x): return self.a(x)[:, self.i]
    """,
    "features of a generator of its own": """
        self.a = nn.Linear(4, 4); g = torch.Generator().manual_seed(7)
        self.register_buffer("r", torch.randn(4, 4, generator=g), persistent=False)
    def forward(self, x): return self.a(torch.cos(x @ self.r))
    """,
    "weight normalisation": """
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    def forward(self, x): return self.a(x)
    """,
    "half precision": """
        self.a = nn.Linear(4, 4).half()
    def forward(self, x): return self.a(x.half())
    """,
}
PLAIN = {
    "features of the seed": """
        torch.manual_seed(7); self.a = nn.Linear(4, 4); self.register_buffer("r", torch.randn(4, 4), persistent=False)
    def forward(self, x): return self.a(torch.cos(x @ self.r))
    """,
    "features drawn after the layers": """
        self.a = nn.Linear(4, 4); self.r = torch.randn(4, 4)
    def forward(self, x): return self.a(torch.cos(x @ self.r))
    """,
    "a list of parameters": """
        self.a = nn.Linear(4, 4); self.tied = [self.a.weight]
    def forward(self, x): return self.a(x) @ self.tied[0]
    """,
    "a parameter that no name leads to": """
        self.a = nn.Linear(4, 4); self.own = [nn.Parameter(torch.empty(4))]; nn.init.normal_(self.own[0])
    def forward(self, x): return self.a(x) * self.own[0]
    """,
    "a view": """
        self.a = nn.Linear(4, 4); self.register_buffer("t", self.a.weight.detach().t(), persistent=False)
    def forward(self, x): return self.a(x) @ self.t
    """,
    "a view of ones": """
        self.s = nn.Parameter(torch.ones(4)); self.half = self.s.detach()[:2]
    def forward(self, x): return x[:, :2] * self.half
    """,
    "an array of numpy": """
        self.a = nn.Linear(4, 4); self.n = self.a.weight.detach().numpy()
    def forward(self, x): return x @ torch.from_numpy(self.n)
    """,
    "memory behind .data": """
        self.a = nn.Linear(4, 4); self.d = self.a.weight.data
    def forward(self, x): return x @ self.d
    """,
    "a copy": """
        self.a = nn.Linear(4, 4); self.first = self.a.weight.detach().clone()
    def forward(self, x): return self.a(x) + x @ self.first
    """,
    "a deep copy that no name leads to": """
        self.a = nn.Linear(4, 4); self.b = [copy.deepcopy(self.a)]
    def forward(self, x): return self.a(x) + self.b[0](x)
    """,
    "a number": """
        self.a = nn.Linear(4, 4); self.scale = self.a.weight.abs().max().item()
    def forward(self, x): return self.a(x) / self.scale
    """,
    "a list of numbers": """
        self.a = nn.Linear(4, 4); self.numbers = self.a.bias.tolist()
    def forward(self, x): return x * torch.tensor(self.numbers)
    """,
    "a branch": """
        self.a = nn.Linear(4, 4); self.sign = 1 if self.a.bias.sum() > 0 else -1
    def forward(self, x): return self.a(x) * self.sign
    """,
    "truncated numbers, drawn until all fit": """
        self.a = nn.Linear(4, 4); nn.init.trunc_normal_(self.a.weight, std=0.02)
    def forward(self, x): return self.a(x)
    """,
    "a random choice": """
        self.a = nn.Linear(4, 4); self.order = torch.randperm(4).tolist()
    def forward(self, x): return self.a(x)[:, self.order]
    """,
    "part of a parameter's memory": """
        whole = torch.empty(8); nn.init.normal_(whole); self.a = nn.Parameter(whole[:4]); self.rest = whole[4:]
    def forward(self, x): return x * self.a + self.rest
    """,
    "a scripted function": """
        self.a = nn.Linear(4, 4)
        with torch.no_grad():
            self.m = biggest(self.a.weight)
    def forward(self, x): return self.a(x) / self.m
    """,
    "weights that the class does not load": """
        self.a = nn.Linear(4, 4)
    def _load_from_state_dict(self, *args): pass
    def load_state_dict(self, state, *args, **kwargs): pass
    def forward(self, x): return self.a(x)
    """,
    "a hook that gives what the file lacks": """
        self.a = nn.Linear(4, 4); self.b = nn.Linear(4, 4)
        def add(m, state, *rest): state.update({"b.weight": m.b.weight, "b.bias": m.b.bias})
        self.register_load_state_dict_pre_hook(add)
    def forward(self, x): return self.a(x) + self.b(x)
    """,
    "an orthogonal matrix": """
        self.a = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4), use_trivialization=False)
        self.q = torch.linalg.qr(self.a.bias.detach().outer(self.a.bias.detach()) + torch.eye(4))[0]
    def forward(self, x): return self.a(x) @ self.q
    """,
}
START = """
import copy
import torch
from torch import nn

@torch.jit.script
def biggest(w):
    return w.abs().max()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
"""


def write(folder: Path, body: str) -> None:
    (folder / "model.py").write_text(START + body.lstrip("\n").rstrip(" "))


def built(folder: Path, seed: int) -> nn.Module:
    """As plain torch builds it."""
    torch.manual_seed(seed)
    model = eager._model_class(folder, "model.py")()
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.parametrize("name", [*SHORT, *PLAIN])
def test_the_model_is_the_one_that_building_and_copying_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write(tmp_path, {**SHORT, **PLAIN}[name])
    torch.save(built(tmp_path, 3).state_dict(), tmp_path / "weights.pth")
    expected = built(tmp_path, 99)
    expected.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    plain: list[str] = []
    build = eager._built
    monkeypatch.setattr(eager, "_built", lambda cls, file: plain.append(file) or build(cls, file))
    torch.manual_seed(99)
    model = load_eager_model(tmp_path, "model.py", tmp_path / "weights.pth")
    x = torch.arange(8.0).view(2, 4) / 4 - 1
    with torch.no_grad():
        assert difference(expected.eval()(x), model(x)) == 0.0
    assert bool(plain) == (name in PLAIN)


def test_a_plain_build_takes_no_short_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, SHORT["layers"])
    torch.save(built(tmp_path, 3).state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(eager, "SkipRandomFill", None)
    assert load_eager_model(tmp_path, "model.py", tmp_path / "weights.pth", plain=True).training is False


def test_the_weights_of_a_zoo_network_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text("from pyserve.zoo import ResNet\nclass Net(ResNet):\n    pass\n")
    torch.save(built(tmp_path, 3).state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(eager, "_built", None)
    model = load_eager_model(tmp_path, "model.py", tmp_path / "weights.pth")
    state = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


QUANTISED = """
import torch
from torch import nn

class M(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.s = torch.ao.quantization.quantize_dynamic(layers, {nn.Linear})

    def forward(self, x):
        return self.s(x)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_state_dict_keeps_its_versions_and_what_is_no_tensor(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(QUANTISED)
    names: dict[str, type[nn.Module]] = {}
    exec(QUANTISED, names)
    torch.manual_seed(1)
    network = names["M"]()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    x = torch.rand(3, 4)
    for plain in (False, True):
        model = load_eager_model(tmp_path, "model.py", tmp_path / "w.pth", plain=plain)
        assert torch.equal(model(x), network(x))
