"""Operators that random models are grown from: each proposes lines of Python for a value that is there already.

Nothing here works out shapes: a proposal is run on example tensors at once, and dropped if torch refuses it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

# How often an operator may work along the batch, so that answers depend on who shares it.
ACROSS_BATCH = 0.06


@dataclass(frozen=True)
class Value:
    """A variable of forward, with what it holds in each of the example calls.

    Attributes:
        shape: its sizes where all calls have the same; None for the batch and free dimensions.
        is_batched: its first dimension is the batch.
    """

    name: str
    tensors: tuple[torch.Tensor, ...]
    shape: tuple[int | None, ...]
    is_batched: bool

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def kind(self) -> str:
        if self.dtype.is_floating_point:
            return "float"
        return "bool" if self.dtype is torch.bool else "int"

    @property
    def cast(self) -> str:
        """What makes a layer of the value's dtype."""
        return "" if self.dtype is torch.float32 else f".to({self.dtype})"


@dataclass
class Step:
    """Lines for forward.

    Attributes:
        results: variables that they make.
        init: lines for the constructor.
        acts: they do more than make their results, so that they stay even if nobody uses these.
        remembers: what they compute depends on earlier calls.
        is_seeded: the constructor makes numbers that no file of weights holds.
    """

    lines: list[str]
    results: list[str]
    init: list[str] = field(default_factory=list)
    acts: bool = False
    remembers: bool = False
    is_seeded: bool = False


class Names:
    """Fresh names, and the dice."""

    def __init__(self, dice: random.Random):
        self.dice = dice
        self._count = 0

    def fresh(self, stem: str = "v") -> str:
        self._count += 1
        return f"{stem}{self._count}"

    def chance(self, share: float) -> bool:
        return self.dice.random() < share

    def number(self) -> float:
        return round(self.dice.uniform(-2, 2), 2)

    def dimension(self, x: Value) -> int:
        """One of ``x``, seldom the batch, as often counted from the end."""
        if x.rank < 2 or self.chance(ACROSS_BATCH):
            return 0
        dim = self.dice.randrange(1, x.rank)
        return dim - x.rank if self.chance(0.5) else dim

    def layer(self, x: Value, built: str, call: str = "{layer}({x})") -> Step:
        """A layer of the constructor, of the value's dtype if that is a float's, called in forward."""
        layer, y = self.fresh("layer"), self.fresh()
        init = [f"self.{layer} = {built}{x.cast if x.kind == 'float' else ''}"]
        return Step([f"{y} = " + call.format(layer=f"self.{layer}", x=x.name)], [y], init)

    def expression(self, text: str, **names: object) -> Step:
        y = self.fresh()
        return Step([f"{y} = " + text.format(**names)], [y])


Operator = Callable[[Names, Value, Sequence[Value]], Step | None]

FLOAT_TEXTS = (
    "torch.relu({x})", "F.gelu({x})", "torch.tanh({x})", "F.hardswish({x})", "torch.sigmoid({x})", "F.silu({x})",
    "F.leaky_relu({x}, 0.2)", "F.softplus({x})", "torch.exp(-{x}.abs())", "{x} * {c}", "{c} - {x}", "F.relu6({x})",
    "{x}.clamp({a}, {b})", "torch.sqrt({x}.abs() + 0.5)", "torch.erf({x})", "F.hardtanh({x})", "F.elu({x})",
    "torch.where({x} > {c}, {x}, {x} * 0.1)", "F.dropout({x}, 0.5, self.training)", "torch.log({x}.abs() + 0.25)",
    "{x} / (1.0 + {x}.abs())", "torch.round({x})", "{x}.floor()", "torch.sin({x}) * {x}", "F.hardsigmoid({x})",
    "torch.nan_to_num({x}, 0.5)", "{x}.masked_fill({x} < {c}, {c})", "{x} ** 2 * 0.1", "F.mish({x})",
)  # fmt: skip
ALONG_TEXTS = (
    "torch.softmax({x}, {d})", "F.log_softmax({x}, {d})", "torch.cumsum({x}, {d})", "{x}.mean({d})", "{x}.sum({d})",
    "{x}.amax({d})", "{x}.amin({d}, keepdim=True)", "{x} - {x}.mean({d}, keepdim=True)", "{x}.flip({d})",
    "torch.roll({x}, 1, {d})", "F.normalize({x} + {c}, dim={d})", "torch.logsumexp({x}, {d})",
    "torch.sort({x}, dim={d}, stable=True)[0]", "torch.topk({x}, 1, dim={d})[0]", "{x}.std({d}, unbiased=False)",
    "{x} / ({x}.abs().amax({d}, keepdim=True) + 0.1)", "torch.argmax({x}, {d})", "torch.cummax({x}, {d})[0]",
    "{x} * torch.softmax({x}, {d})", "{x}.median({d})[0]", "torch.cat([{x}, {x} * {c}], {d})", "{x}.select({d}, 0)",
    "{x}.narrow({d}, 0, 1)", "torch.stack([{x}, {x} + {c}], {d})", "{x}.unsqueeze({d})", "torch.chunk({x}, 2, {d})[0]",
    "{x}.index_select({d}, torch.tensor([0, 0]))", "{x}.cumprod({d}).clamp(-10.0, 10.0)",
    "{x}.argsort({d}, stable=True)",
)  # fmt: skip
INT_TEXTS = (
    "{x} * 3 + 1", "{x} % 7", "torch.div({x}, 2, rounding_mode='floor')", "{x} & 3", "{x} << 1", "{x} ^ 5", "{x} // 3",
    "{x}.float() * 0.1", "{x}.to(torch.int32)", "{x} == 2", "{x}.cumsum(-1)", "{x} + 100085", "-{x}", "{x}.abs()",
    "{x}.sum(-1)", "{x}.clamp(-2, 9)", "({x} > 1).float()", "{x} / 4", "{x}.double() * 0.5", "{x}.remainder(5)",
    "torch.where({x} > 3, {x}, {x} * 2)", "{x}.float().sqrt()", "{x} * 1000003",
)  # fmt: skip
BOOL_TEXTS = ("~{x}", "{x}.float()", "{x}.any(-1)", "{x}.long()", "{x}.all(-1)", "{x}.sum(-1)", "{x}.float().mean(-1)")
VIEW_TEXTS = (
    "{x}.flatten(1)", "{x}.reshape({x}.shape[0], -1)", "{x}[:, 1:]", "{x}[:, ::2]", "{x}[..., -1]", "{x}[:, -1]",
    "{x}.transpose(1, -1)", "{x}.view({x}.size(0), -1)", "{x}.unsqueeze(1).expand(-1, 3, *[-1] * ({x}.dim() - 1))",
    "{x}.permute(0, *range({x}.dim() - 1, 0, -1))", "{x}[:, :4]", "{x}[:, 0]", "F.pad({x}, [1, 1])", "{x}[..., :2]",
    "{x}.squeeze()", "{x}.squeeze(-1)", "{x}.repeat_interleave(2, 1)", "{x}[:, [0, 0]]", "{x}.contiguous()",
)  # fmt: skip
BINARY_TEXTS = (
    "{x} + {y}", "{x} * {y}", "{x} - {y}", "torch.maximum({x}, {y})", "torch.cat([{x}, {y}], -1)", "{x} > {y}",
    "torch.where({y} > 0, {x}, 0.5)", "{x} @ {y}.transpose(-1, -2)", "torch.cat([{x}, {y}], 1)", "{x} @ {y}",
    "{x} * {y}.unsqueeze(-1)", "({x} * {y}.unsqueeze(-1)).sum(1) / {y}.sum(1, keepdim=True).clamp(min=1)",
    "{x}.masked_fill({y} == 0, {c})", "{x} / ({y}.abs() + 0.5)", "torch.einsum('bi,bj->bij', {x}, {y})",
    "{x}.masked_fill(({y} == 0).unsqueeze(-1), {c})", "torch.minimum({x}, {y}.to({x}.dtype))",
    "torch.stack([{x}, {y}], 1)", "torch.gather({x}, 1, {y}.long().abs() % {x}.shape[1])",
    "{x} + {y}.mean(1, keepdim=True)", "torch.hypot({x}, {y})",
    "torch.bmm({x}, {y}.transpose(1, 2))", "({x}.unsqueeze(1) * {y}.unsqueeze(2)).sum(-1)",
)  # fmt: skip


def texts(choices: Sequence[str]) -> Operator:
    def propose(names: Names, x: Value, _: Sequence[Value]) -> Step:
        low, high = sorted((names.number(), names.number()))
        return names.expression(
            names.dice.choice(choices), x=x.name, c=names.number(), a=low, b=high, d=names.dimension(x)
        )

    return propose


def binary(names: Names, x: Value, values: Sequence[Value]) -> Step:
    y = names.dice.choice(list(values))
    return names.expression(names.dice.choice(BINARY_TEXTS), x=x.name, y=y.name, c=names.number())


def linear(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    if not x.shape or x.shape[-1] is None:
        return None
    bias = ", bias=False" if names.chance(0.3) else ""
    return names.layer(x, f"nn.Linear({x.shape[-1]}, {names.dice.randint(1, 6)}{bias})")


def convolution(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    if x.rank not in (3, 4) or x.shape[1] is None:
        return None
    kind = names.dice.choice(["Conv", "Conv", "ConvTranspose"])
    more = names.dice.choice(["3, padding=1", "2", "3, stride=2, padding=1", "1"])
    return names.layer(x, f"nn.{kind}{x.rank - 2}d({x.shape[1]}, {names.dice.randint(2, 4)}, {more})")


def norm(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    if x.rank in (3, 4) and x.shape[1] is not None and names.chance(0.6):
        channels, rank = x.shape[1], x.rank - 2
        built = names.dice.choice([
            f"nn.BatchNorm{rank}d({channels})", f"nn.InstanceNorm{rank}d({channels}, affine=True)",
            f"nn.GroupNorm(1, {channels})", f"nn.PReLU({channels})",
            f"nn.BatchNorm{rank}d({channels}, track_running_stats=False)",
        ])  # fmt: skip
        return names.layer(x, built)
    if x.rank == 2 and x.shape[1] is not None and names.chance(0.5):
        return names.layer(x, f"nn.BatchNorm1d({x.shape[1]})")
    if x.rank < 2 or x.shape[-1] is None:
        return None
    return names.layer(x, names.dice.choice([f"nn.LayerNorm({x.shape[-1]})", f"nn.RMSNorm({x.shape[-1]})"]))


def recurrent(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    if x.rank != 3 or x.shape[2] is None:
        return None
    # Without batch_first it goes along the batch, a mistake that loads and answers.
    first = "" if names.chance(0.1) else ", batch_first=True"
    both = ", bidirectional=True" if names.chance(0.3) else ""
    built = f"nn.{names.dice.choice(['GRU', 'LSTM', 'RNN'])}({x.shape[2]}, {names.dice.randint(2, 4)}{first}{both})"
    return names.layer(x, built, "{layer}({x})[0]")


def attention(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    if x.rank != 3 or x.shape[2] is None:
        return None
    way = names.dice.randrange(4)
    if way == 0:
        return names.layer(x, f"nn.MultiheadAttention({x.shape[2]}, 1, batch_first=True)", "{layer}({x}, {x}, {x})[0]")
    if way == 1:
        return names.expression("F.scaled_dot_product_attention({x}, {x}, {x}, is_causal={c})", x=x.name,
                                c=names.chance(0.5))  # fmt: skip
    if way == 2:
        built = f"nn.TransformerEncoderLayer({x.shape[2]}, 1, 8, batch_first=True)"
        return names.layer(x, built)
    query, scores, y = names.fresh("query"), names.fresh("scores"), names.fresh()
    layer = names.fresh("layer")
    return Step([
        f"{query} = self.{layer}({x.name})",
        f"{scores} = torch.softmax({query} @ {x.name}.transpose(1, 2) / math.sqrt({x.name}.shape[1]), -1)",
        f"{y} = {scores} @ {x.name}",
    ], [y], [f"self.{layer} = nn.Linear({x.shape[2]}, {x.shape[2]}){x.cast}"])  # fmt: skip


def pooling(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    if x.rank not in (3, 4):
        return None
    text = names.dice.choice([
        "F.adaptive_avg_pool{n}d({x}, 2)", "F.max_pool{n}d({x}, 3, 1, 1)", "F.avg_pool{n}d({x}, 2)",
        "F.adaptive_max_pool{n}d({x}, 1)", "F.interpolate({x}, scale_factor=2.0)", "F.interpolate({x}, size={s})",
    ])  # fmt: skip
    return names.expression(text, x=x.name, n=x.rank - 2, s=[3] * (x.rank - 2))


def embedding(names: Names, x: Value, _: Sequence[Value]) -> Step:
    rows = names.dice.choice([7, 12, 50])
    call = "{layer}({x} % " + str(rows) + ")" if names.chance(0.6) else "{layer}({x})"
    if x.rank == 2 and names.chance(0.2):
        return names.layer(x, f"nn.EmbeddingBag({rows}, 3)", call)
    return names.layer(x, f"nn.Embedding({rows}, {names.dice.randint(2, 5)})", call)


def one_hot(names: Names, x: Value, _: Sequence[Value]) -> Step:
    return names.expression("F.one_hot({x}.long() % 5, 5)", x=x.name)


def positions(names: Names, x: Value, _: Sequence[Value]) -> Step | None:
    """What is added depends on a size only."""
    if x.rank < 2:
        return None
    text = names.dice.choice([
        "{x} + torch.arange({x}.shape[1]).view(1, -1{ones}) * 0.1", "{x} / {x}.shape[1]",
        "{x} * torch.ones({x}.shape[1]).cumsum(0).view(1, -1{ones})", "{x} + float({x}.shape[1])",
        "{x} * math.sqrt({x}.shape[-1])", "torch.tril({x})", "{x} + torch.full_like({x}, {x}.size(1) * 0.5)",
    ])  # fmt: skip
    return names.expression(text, x=x.name, ones=", 1" * (x.rank - 2))


FLOAT_OPERATORS: list[tuple[float, Operator]] = [
    (5, texts(FLOAT_TEXTS)), (4, texts(ALONG_TEXTS)), (3, texts(VIEW_TEXTS)), (4, binary), (4, linear),
    (3, convolution), (2, norm), (2, recurrent), (2, attention), (2, pooling), (1.5, positions),
]  # fmt: skip
INT_OPERATORS: list[tuple[float, Operator]] = [
    (4, embedding), (3, texts(INT_TEXTS)), (1, one_hot), (1, texts(VIEW_TEXTS)), (1, binary),
]  # fmt: skip
BOOL_OPERATORS: list[tuple[float, Operator]] = [(4, texts(BOOL_TEXTS)), (1, texts(VIEW_TEXTS)), (1, binary)]
