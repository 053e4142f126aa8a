"""What a constructor does that a shortcut of loading may lose."""

from __future__ import annotations

from .case import Case, floats, tensor

X, ITEMS = (tensor(4),), floats(4)

CASES = [
    Case(
        "seeded_features", "random features, made anew from a seed", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(7)
                self.fc = nn.Linear(8, 3)
                self.register_buffer("R", torch.randn(4, 8), persistent=False)

            def forward(self, x):
                return self.fc(torch.cos(x @ self.R))
        """, X, ITEMS, ("eager", "scripted"), precisions=("fp32", "bf16"), may_refuse=("bf16",),
    ),
    Case(
        "numpy_features", "random features of numpy", """
        import numpy as np

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(8, 3)
                table = np.random.RandomState(5).randn(4, 8)
                self.register_buffer("R", torch.tensor(table, dtype=torch.float32), persistent=False)

            def forward(self, x):
                return self.fc(torch.cos(x @ self.R))
        """, X, ITEMS,
    ),
    Case(
        "tied_in_a_list", "tied without a second name", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
                self._tied = [self.fc.weight]

            def forward(self, x):
                return self.fc(x) @ self._tied[0]
        """, X, ITEMS,
    ),
    Case(
        "tied_by_a_view", "a buffer that looks into a parameter", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4, bias=False)
                self.register_buffer("wt", self.fc.weight.detach().t(), persistent=False)

            def forward(self, x):
                return self.fc(x) @ self.wt
        """, X, ITEMS,
    ),
    Case(
        "tied_by_name", "two names of one parameter", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.e = nn.Embedding(10, 4)
                self.h = nn.Linear(4, 10, bias=False)
                self.h.weight = self.e.weight

            def forward(self, x):
                return self.h(x)
        """, X, ITEMS, precisions=("fp32", "bf16"),
    ),
    Case(
        "tied_in_a_closure", "a parameter within a function", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
                weight = self.fc.weight
                self.back = lambda y: y @ weight

            def forward(self, x):
                return self.back(self.fc(x))
        """, X, ITEMS,
    ),
    Case(
        "weight_norm", "weights computed from others", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
                self.b = torch.nn.utils.spectral_norm(nn.Linear(4, 4))

            def forward(self, x):
                return self.b(self.a(x))
        """, X, ITEMS,
    ),
    Case(
        "orthogonal", "weights computed by a parametrization", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = torch.nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
                self.b = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))

            def forward(self, x):
                return self.b(self.a(x))
        """, X, ITEMS,
    ),
    Case(
        "seed_of_a_constant", "a seeded plain number", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
                torch.manual_seed(11)
                nn.Linear(4, 4)
                self.scale = float(torch.rand(()))
                self.order = torch.randperm(4)

            def forward(self, x):
                return self.fc(x)[:, self.order] * self.scale
        """, X, ITEMS,
    ),
    Case(
        "initial_weights_matter", "a plain number computed from a seeded parameter", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(3)
                self.fc = nn.Linear(4, 4)
                self.scale = float(self.fc.weight.detach().abs().sum())

            def forward(self, x):
                return self.fc(x) * self.scale
        """, X, ITEMS,
    ),
    Case(
        "loaded_hook", "computes a table after its weights were loaded", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
                self.register_buffer("doubled", torch.zeros(4, 4), persistent=False)
                self.register_load_state_dict_post_hook(self.fill)

            @staticmethod
            def fill(module, keys):
                module.doubled.copy_(module.fc.weight.detach() * 2)

            def forward(self, x):
                return self.fc(x) @ self.doubled
        """, X, ITEMS,
    ),
    Case(
        "extra_state", "keeps a number beside its tensors", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
                self.factor = torch.rand(1)

            def get_extra_state(self):
                return self.factor

            def set_extra_state(self, state):
                self.factor = state

            def forward(self, x):
                return self.fc(x) * self.factor
        """, X, ITEMS,
    ),
    Case(
        "running_statistics", "running statistics that the constructor changes", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
                self.norm = nn.BatchNorm1d(4)
                self.other = nn.BatchNorm1d(4, track_running_stats=True)
                with torch.no_grad():
                    self.norm.running_mean.uniform_()
                    self.other.running_var.uniform_().add_(0.5)

            def forward(self, x):
                return self.other(self.norm(self.fc(x)))
        """, X, ITEMS, ("eager", "scripted"), precisions=("fp32", "bf16"),
    ),
]  # fmt: skip
