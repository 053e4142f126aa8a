"""What depends on the numbers or on sizes: a trace of one example knows one way through."""

from __future__ import annotations

import torch

from .case import Case, Item, Items, floats, lengths, tensor, whole


def _masked(masks: list[list[int]]) -> Items:
    """Eight ids from 1 to 49, and each of these masks."""

    def make(generator: torch.Generator) -> list[Item]:
        return [(torch.randint(1, 50, (1, 8), generator=generator), torch.tensor([mask])) for mask in masks]

    return make


def _filled(generator: torch.Generator) -> list[Item]:
    """Ids of lengths 0 to 8, filled up with zeros."""
    items: list[Item] = []
    for length in (8, 3, 1, 0, 5):
        ids = torch.randint(1, 50, (1, 8), generator=generator)
        ids[:, length:] = 0
        items.append((ids,))
    return items


def _with_lengths(generator: torch.Generator) -> list[Item]:
    return [(torch.randint(1, 50, (1, 8), generator=generator), torch.tensor([[length]])) for length in (3, 8, 1, 5)]


def _with_token(generator: torch.Generator) -> list[Item]:
    """Ids of which some items have 737."""
    items: list[Item] = []
    for at in (None, 2, None, 7, None):
        ids = torch.randint(0, 700, (1, 8), generator=generator)
        if at is not None:
            ids[0, at] = 737
        items.append((ids,))
    return items


IDS, MASK = tensor(8, dtype="int64", name="ids"), tensor(8, dtype="int64", name="mask")
MASKS = [[1, 1, 1, 0, 0, 0, 0, 0], [0] * 8, [1] * 8, [0, 1, 0, 1, 0, 1, 0, 1]]

CASES = [
    Case(
        "mask_branch", "an empty mask takes another way, and the example's is empty", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.e = nn.Embedding(50, 8)

            def forward(self, ids, mask, **kwargs):
                h = self.e(ids)
                if bool((mask == 0).all()):
                    return h.mean(1)
                m = mask.unsqueeze(-1).to(h.dtype)
                return (h * m).sum(1) / m.sum(1).clamp(min=1e-6)
        """, (IDS, MASK), _masked(MASKS[:1] + MASKS[1:2] + MASKS[2:]),
    ),
    Case(
        "length_without_padding", "reads a length from the ids", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.e = nn.Embedding(50, 8)

            def forward(self, ids, **kwargs):
                n = int((ids != 0).sum(1).max())
                return self.e(ids[:, :max(n, 1)]).sum(1)
        """, (tensor(8, dtype="int64"),), _filled,
    ),
    Case(
        "autoscale", "if x.max() > 2: no example in [0, 1) gets there", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 3)

            def forward(self, x, **kwargs):
                if x.max() > 2:
                    x = x / 255
                return self.fc(x)
        """, (tensor(4),), lambda generator: [(torch.rand(1, 4, generator=generator) * scale,) for scale in
                                              (1, 255, 1, 100, 1.9)],
    ),
    Case(
        "autoscale_plain", "the same branch, scriptable, and of the whole batch", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 3)

            def forward(self, x):
                if bool(x.max() > 2):
                    x = x / 255
                return self.fc(x)
        """, (tensor(4),), lambda generator: [(torch.rand(1, 4, generator=generator) * scale,) for scale in
                                              (1, 255, 1, 100, 1.9)], ("eager", "scripted"),
    ),
    Case(
        "negative_branch", "if x.min() < 0", """
        class Net(nn.Module):
            def forward(self, x):
                if x.min().item() < 0:
                    return x.abs().sqrt()
                return x * 2
        """, (tensor(4),), lambda generator: [(torch.rand(1, 4, generator=generator) - shift,) for shift in
                                              (0, 0.5, 1, 0, 0)], ("eager", "scripted"),
    ),
    Case(
        "long_branch", "if length > 32: no example of 16 gets there", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.e = nn.Embedding(50, 8)

            def forward(self, ids, **kwargs):
                h = self.e(ids)
                if ids.shape[1] > 32:
                    h = F.avg_pool1d(h.transpose(1, 2), 2).transpose(1, 2) * 2
                return h.mean(1)
        """, (tensor(-1, dtype="int64"),), whole(0, 49, 16, 20, 40, 1, 33, 65),
    ),
    Case(
        "far_branch", "if length > 100: rarely tried", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.e = nn.Embedding(50, 8)

            def forward(self, ids):
                h = self.e(ids)
                if ids.shape[1] > 100:
                    h = h[:, -100:]
                return h.sum(1)
        """, (tensor(-1, dtype="int64"),), whole(0, 49, 3, 16, 100, 101, 150), ("eager", "scripted"),
    ),
    Case(
        "single_branch", "if length == 1", """
        class Net(nn.Module):
            def forward(self, x):
                if x.shape[1] == 1:
                    return x[:, 0] * 10
                return x.mean(1)
        """, (tensor(-1, 4),), lengths(1, 2, 16, 1, 5), ("eager", "scripted"),
    ),
    Case(
        "plain_loop", "a loop over the length, of which the tracer says nothing", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x, **kwargs):
                h = torch.zeros(x.shape[0], 4)
                for t in range(x.shape[1]):
                    h = torch.tanh(self.fc(x[:, t]) + h)
                return h
        """, (tensor(-1, 4),), lengths(16, 5, 30, 1),
    ),
    Case(
        "scripted_loop", "the same loop, which scripts exactly", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x):
                h = torch.zeros(x.shape[0], 4)
                for t in range(x.shape[1]):
                    h = torch.tanh(self.fc(x[:, t]) + h)
                return h
        """, (tensor(-1, 4),), lengths(16, 5, 30, 1), ("eager", "scripted"), precisions=("fp32", "bf16"),
    ),
    Case(
        "unbound_list", "a Python list over the length", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x):
                return torch.stack([self.fc(t) for t in x.unbind(1)], 1).sum(1)
        """, (tensor(-1, 4),), lengths(16, 5, 30, 1),
    ),
    Case(
        "chunks", "splits the length into pieces of 8", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x):
                return sum(self.fc(piece).amax(1) for piece in x.split(8, 1))
        """, (tensor(-1, 4),), lengths(16, 17, 40, 3, 8),
    ),
    Case(
        "read_through_numpy", "sizes computed outside of torch", """
        import numpy as np

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x):
                n = np.sqrt(len(x.shape) + x.detach().numpy().shape[1])
                return self.fc(x).sum(1) / float(n)
        """, (tensor(-1, 4),), lengths(16, 5, 30),
    ),
    Case(
        "numbers_through_numpy", "numbers computed outside of torch become constants", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x):
                order = torch.from_numpy(x.detach().numpy().argsort(1).copy())
                return torch.gather(self.fc(x), 1, order)
        """, (tensor(4),), floats(4, scales=(1, 1, 1, 1, 1)),
    ),
    Case(
        "compared_tensors", "torch.equal, of which the tracer says nothing", """
        class Net(nn.Module):
            def forward(self, a, b):
                if torch.equal(a, b):
                    return a * 0
                return a - b * 2
        """, (tensor(4, name="a"), tensor(4, name="b")),
        lambda generator: [(one := torch.randn(1, 4, generator=generator), one.clone()),
                           (one, one + 1), (torch.zeros(1, 4), torch.zeros(1, 4)), (one * 3, -one)],
        ("eager", "scripted"),
    ),
    Case(
        "until_small", "halves until it is small enough", """
        class Net(nn.Module):
            def forward(self, x):
                n = torch.zeros(x.shape[0], 1)
                while bool(x.abs().max() > 1):
                    x = x / 2
                    n = n + 1
                return torch.cat([x, n], 1)
        """, (tensor(4),), floats(4), ("eager", "scripted"),
    ),
    Case(
        "experts", "each item chooses its layer", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

            def forward(self, x, which):
                return torch.stack([self.experts[int(w)](row) for row, w in zip(x, which[:, 0])])
        """, (tensor(4, name="x"), tensor(1, dtype="int64", name="which")),
        lambda generator: [(torch.randn(1, 4, generator=generator), torch.tensor([[w]])) for w in (0, 1, 2, 1)],
    ),
    Case(
        "sums_of_lengths", "slices by a number of the input", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.e = nn.Embedding(50, 8)

            def forward(self, ids, lengths):
                h = self.e(ids)
                return torch.stack([h[i, : int(n)].sum(0) for i, n in enumerate(lengths[:, 0])])
        """, (IDS, tensor(1, dtype="int64", name="lengths")), _with_lengths,
    ),
    Case(
        "packed_sequence", "lengths are read on the CPU and become constants", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.e = nn.Embedding(50, 8)
                self.g = nn.GRU(8, 8, batch_first=True)

            def forward(self, ids, lengths):
                sizes = lengths.clamp(min=1).squeeze(1)
                packed = nn.utils.rnn.pack_padded_sequence(self.e(ids), sizes, batch_first=True, enforce_sorted=False)
                return self.g(packed)[1][-1]
        """, (IDS, tensor(1, dtype="int64", name="lengths")), _with_lengths,
    ),
    Case(
        "special_token", "one number of a thousand takes another way: random probes miss it", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.e = nn.Embedding(1000, 8)

            def forward(self, ids):
                h = self.e(ids)
                if bool((ids == 737).any()):
                    h = h * 2
                return h.sum(1)
        """, (tensor(8, dtype="int64", vocabulary=1000),), _with_token, ("eager", "scripted"),
    ),
    Case(
        "huge_branch", "if a number is above a million", """
        class Net(nn.Module):
            def forward(self, x):
                if bool(x.abs().max() > 1e6):
                    return torch.log(x.abs() + 1)
                return x * 2
        """, (tensor(4),), floats(4, scales=(1, 1e7, 10, 1e9, 1e5)), ("eager", "scripted"),
    ),
    Case(
        "batch_branch", "another way for a batch than for one", """
        class Net(nn.Module):
            def forward(self, x):
                if x.shape[0] > 1:
                    return x * 2
                return x * 3
        """, (tensor(4),), floats(4), ("eager", "scripted"),
    ),
]  # fmt: skip
