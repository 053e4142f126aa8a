"""Tiny networks around one operator or idiom each, where two ways to compute it might disagree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.support.odd_batches import odd_batches
from tests.support.random_models import HEAD, build


@dataclass(frozen=True)
class Operator:
    """A network.

    Attributes:
        forward: what it returns, of ``x``.
        shape: of an item; a text such as ``1..64`` is a free size, as in model-config.yaml.
        init: lines of its constructor.
        vocabulary: whole numbers from 0 to one less than this are asked for.
        before: lines of forward before the last one.
    """

    forward: str
    shape: tuple[int | str, ...] = (6,)
    dtype: str = "float32"
    init: str = ""
    vocabulary: int | None = None
    before: str = ""

    @property
    def source(self) -> str:
        init, before = (
            "".join(f"        {line.strip()}\n" for line in lines.split(";") if line.strip())
            for lines in (self.init, self.before)
        )
        return (
            f"{HEAD}class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            f"        torch.manual_seed(0)\n{init}\n    def forward(self, x):\n{before}        return {self.forward}\n"
        )

    def network(self) -> nn.Module:
        return build(self.source, 0)

    @property
    def config(self) -> dict[str, Any]:
        """Its input in model-config.yaml."""
        more = {} if self.vocabulary is None else {"vocabulary": self.vocabulary}
        return {"dtype": self.dtype, "shape": list(self.shape), **more}

    def inputs(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Batches, and what is special about each."""
        return odd_batches(self.shape, getattr(torch, self.dtype), self.vocabulary)


PICTURE = (2, 7, 9)
ROWS = (5, 4)
FREE = ("1..64",)


def _conv(arguments: str, shape: tuple[int, ...] = PICTURE, kind: str = "Conv2d") -> Operator:
    return Operator("self.f(x)", shape, init=f"self.f = nn.{kind}({arguments})")


def _resized(arguments: str, shape: tuple[int, ...] = PICTURE) -> Operator:
    return Operator(f"F.interpolate(x, {arguments})", shape)


def _activation(call: str) -> Operator:
    return Operator(call, (9,))


def _whole(forward: str, dtype: str = "int64", shape: tuple[int | str, ...] = (6,), init: str = "") -> Operator:
    return Operator(forward, shape, dtype, init)


NETWORKS: dict[str, Operator] = {
    # Choices among numbers, many of them equal.
    "argmax": Operator("x.argmax(1)"),
    "argmin": Operator("x.argmin(1)"),
    "argmax of 2 dimensions": Operator("x.argmax(2), x.argmax(1, keepdim=True), x.flatten(1).argmin(1)", ROWS),
    "max with places": Operator("x.max(1)"),
    "min with places": Operator("x.min(1)"),
    "topk": Operator("torch.topk(x, 3, 1)", (9,)),
    "topk smallest": Operator("torch.topk(x, 3, 1, largest=False)", (9,)),
    "topk values": Operator("torch.topk(x, 3, 1)[0]", (9,)),
    "sort": Operator("torch.sort(x, 1)", (9,)),
    "sort stable descending": Operator("torch.sort(x, dim=1, descending=True, stable=True)", (9,)),
    "sort values": Operator("torch.sort(x, 1)[0]", (20,)),
    "argsort": Operator("x.argsort(stable=True, dim=1)"),
    "median": Operator("x.median(1)"),
    "kthvalue": Operator("x.kthvalue(2, 1)"),
    "cummax": Operator("x.cummax(1)"),
    "argmax of whole numbers": _whole("x.argmax(1), x.amax(1)"),
    "topk of whole numbers": _whole("torch.topk(x, 2, 1)"),
    "sign, signbit": Operator("torch.sign(x), torch.signbit(x)"),
    "copysign": Operator("torch.copysign(torch.ones(6), x)"),
    "atan2": Operator("torch.atan2(x, -torch.ones(6))"),
    "atan2 of zeros": Operator("torch.atan2(x[:, :3], x[:, 3:])"),
    "amax, amin": Operator("x.amax(1), x.amin(1), x.aminmax(dim=1)"),
    "maximum, minimum": Operator("torch.maximum(x[:, :3], x[:, 3:]), torch.minimum(x, torch.zeros(6))"),
    "fmax": Operator("torch.fmax(x, torch.zeros(6))"),
    # Pools.
    "max_pool ceil": Operator("F.max_pool2d(x, 3, 2, 1, ceil_mode=True)", PICTURE),
    "max_pool dilation": Operator("F.max_pool2d(x, 3, 2, 1, dilation=2)", PICTURE),
    "max_pool places": Operator("F.max_pool2d(x, 2, 2, return_indices=True)", PICTURE),
    "max_pool places padded": Operator("F.max_pool2d(x, 3, 2, 1, 1, True, True)", PICTURE),
    "max_pool1d ceil": Operator("F.max_pool1d(x, 2, 2, ceil_mode=True)", (2, 7)),
    "max_unpool": Operator("F.max_unpool2d(*F.max_pool2d(x, 2, 2, return_indices=True), 2, 2)", (2, 6, 8)),
    "avg_pool ceil": Operator("F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)", PICTURE),
    "avg_pool not counted": Operator("F.avg_pool2d(x, 3, 2, 1, True, count_include_pad=False)", PICTURE),
    "avg_pool divisor": Operator("F.avg_pool2d(x, 3, 2, 1, divisor_override=5)", PICTURE),
    "avg_pool1d": Operator("F.avg_pool1d(x, 3, 2, 1, True, False), F.avg_pool1d(x, 2, 2, 0, True)", (2, 7)),
    "adaptive_avg_pool": Operator("F.adaptive_avg_pool2d(x, (3, 4)), F.adaptive_avg_pool2d(x, (None, 2))", PICTURE),
    "adaptive_max_pool": Operator("F.adaptive_max_pool2d(x, (3, 4))", PICTURE),
    "adaptive_max_pool places": Operator("F.adaptive_max_pool2d(x, (3, 4), return_indices=True)", PICTURE),
    "lp_pool": Operator("F.lp_pool2d(x, 2, 2, ceil_mode=True)", PICTURE),
    # Pictures made smaller and larger.
    "nearest down": _resized("size=(3, 4), mode='nearest'"),
    "nearest up": _resized("size=(10, 13), mode='nearest'"),
    "nearest scale": _resized("scale_factor=1.7, mode='nearest'"),
    "nearest scale recomputed": _resized("scale_factor=0.6, mode='nearest', recompute_scale_factor=True"),
    "nearest-exact": _resized("size=(4, 13), mode='nearest-exact'"),
    "bilinear down": _resized("size=(3, 4), mode='bilinear'"),
    "bilinear aligned": _resized("size=(10, 5), mode='bilinear', align_corners=True"),
    "bilinear to one": _resized("size=(1, 1), mode='bilinear', align_corners=True"),
    "bilinear scale": _resized("scale_factor=(1.3, 2.6), mode='bilinear'"),
    "bilinear antialias": _resized("size=(3, 5), mode='bilinear', antialias=True"),
    "bicubic": _resized("size=(3, 13), mode='bicubic'"),
    "bicubic aligned": _resized("size=(10, 5), mode='bicubic', align_corners=True"),
    "bicubic scale": _resized("scale_factor=1.6, mode='bicubic'"),
    "bicubic antialias": _resized("size=(3, 5), mode='bicubic', antialias=True"),
    "area": _resized("size=(3, 4), mode='area'"),
    "linear": _resized("size=11, mode='linear'", (2, 7)),
    "trilinear": _resized("scale_factor=1.5, mode='trilinear'", (1, 3, 4, 5)),
    "grid_sample": Operator(
        "F.grid_sample(x, g, align_corners=False), F.grid_sample(x, g, align_corners=True)", PICTURE,
        before="g = x[:, :, :4, :5].permute(0, 2, 3, 1)"),
    "grid_sample borders": Operator(
        "F.grid_sample(x, g, padding_mode='border'), F.grid_sample(x, g, padding_mode='reflection')", PICTURE,
        before="g = x[:, :, :4, :5].permute(0, 2, 3, 1) / 3.0"),
    "grid_sample nearest": Operator(
        "F.grid_sample(x, g, mode='nearest', align_corners=False)", PICTURE,
        before="g = x[:, :, :4, :5].permute(0, 2, 3, 1)"),
    "grid_sample bicubic": Operator(
        "F.grid_sample(x, g, mode='bicubic', align_corners=True)", PICTURE,
        before="g = x[:, :, :4, :5].permute(0, 2, 3, 1).clamp(-1.2, 1.2)"),
    "affine_grid": Operator("F.affine_grid(x.reshape(-1, 2, 3), (x.shape[0], 1, 4, 5), align_corners=False)"),
    # Activations.
    "gelu": _activation("F.gelu(x), F.gelu(x, approximate='tanh')"),
    "hardswish": _activation("F.hardswish(x), F.hardsigmoid(x), F.relu6(x), F.hardtanh(x, -0.5, 2.0)"),
    "softplus": _activation("F.softplus(x, beta=3, threshold=2), F.softplus(x), F.softplus(x, 0.1, 20)"),
    "elu": _activation("F.elu(x, 0.3), F.celu(x, 0.3), F.selu(x), F.celu(x, 4.0)"),
    "mish": _activation("F.mish(x), F.silu(x), F.tanhshrink(x), F.softsign(x)"),
    "leaky_relu": _activation("F.leaky_relu(x, 0.3), F.leaky_relu(x, -0.5), F.rrelu(x), F.threshold(x, 0.1, 20.0)"),
    "shrinks": _activation("F.hardshrink(x, 0.5), F.softshrink(x, 0.5), F.logsigmoid(x)"),
    "prelu": Operator("self.f(x)", (3, 4), init="self.f = nn.PReLU(3); self.f.weight.data = torch.tensor([-1., 0, 2])"),
    "glu": Operator("F.glu(x, 1)"),
    "logit": Operator("torch.logit(x, 1e-3), torch.special.expit(x)"),
    "exp of large": Operator("torch.exp(x), torch.expm1(x), torch.exp2(x)"),
    "trigonometry": Operator("torch.sin(x), torch.cos(x), torch.atan(x), torch.asinh(x)"),
    "hyperbolic": Operator("torch.tanh(x), torch.sinh(x), torch.cosh(x), torch.erf(x)"),
    "logarithms": Operator("torch.log(x), torch.log1p(x), torch.log2(x), torch.log10(x)"),
    "roots": Operator("torch.sqrt(x), torch.rsqrt(x), torch.reciprocal(x)"),
    "powers": Operator("x ** 2, x ** 3, x ** 0.5, x ** -1, 2 ** x"),
    "power of both": Operator("torch.pow(x[:, :3], x[:, 3:])"),
    # Rounding.
    "nan_to_num": Operator("torch.nan_to_num(x, 1.5, 7.0, -7.0), torch.nan_to_num(x)"),
    "isnan": Operator("x.isnan(), x.isinf(), torch.isfinite(x)"),
    "clamp": Operator("x.clamp(min=0.5), x.clamp(max=-0.5), x.clamp(2, 1), x.clamp(torch.zeros(6), torch.ones(6))"),
    "round": Operator("torch.round(x), torch.round(x, decimals=2), torch.round(x, decimals=-1)"),
    "trunc": Operator("torch.trunc(x), torch.frac(x), torch.floor(x), torch.ceil(x)"),
    "floor_divide": Operator("torch.floor_divide(x, 0.7), torch.floor_divide(x, -3.0), x // 2"),
    "remainder": Operator("torch.remainder(x, 0.7), torch.remainder(x, -3.0), x % 2"),
    "fmod": Operator("torch.fmod(x, 0.7), torch.fmod(x, -3.0)"),
    "div rounded": Operator("torch.div(x, 0.3, rounding_mode='trunc'), torch.div(x, -0.3, rounding_mode='floor')"),
    "remainder of both": Operator("torch.remainder(x[:, :3], x[:, 3:])"),
    # Sums, norms and what is made of them.
    "softmax": Operator("x.softmax(1), x.log_softmax(2), F.softmin(x, 0 + 2)", ROWS),
    "softmax over 4 dimensions": Operator("x.softmax(1), x.log_softmax(1), x.softmax(3)", PICTURE),
    "logsumexp": Operator("x.logsumexp(1), x.logsumexp((1, 2))", ROWS),
    "norms": Operator("x.norm(1, 2), x.norm(2, 2), x.norm(float('inf'), 2), x.norm(3, 1)", ROWS),
    "normalize": Operator("F.normalize(x, dim=2), F.normalize(x, p=1.0, dim=1)", ROWS),
    "variance": Operator("x.var(1), x.var(1, unbiased=False), x.std((1, 2)), torch.var_mean(x, 2)", ROWS),
    "cumsum": Operator("x.cumsum(1), x.cumsum(2).flip(1)", ROWS),
    "cumprod": Operator("x.cumprod(1)", ROWS),
    "prod": Operator("x.prod(1)", ROWS),
    "logcumsumexp": Operator("x.logcumsumexp(1)", ROWS),
    "cdist": Operator("torch.cdist(x, x + 1), torch.cdist(x, torch.ones(3, 4), p=1.0)", ROWS),
    "cosine_similarity": Operator("F.cosine_similarity(x[:, :2], x[:, 2:4], 2), F.pairwise_distance(x[:, 0], x[:, 1])",
                                  ROWS),
    "any, all": Operator("(x > 0).any(1), (x > 0).all(1), x.any(1), x.count_nonzero(1)"),
    "sum of a million": Operator("x.sum((1, 2)), x.mean((1, 2)), x.cumsum(2)[:, -1, -1]", (16, 65536)),
    "layer_norm": Operator("self.f(x), F.layer_norm(x, (5, 4), eps=1e-12), F.layer_norm(x, (4,), eps=0.5)", ROWS,
                           init="self.f = nn.LayerNorm(4, eps=1e-3)"),
    "group_norm": Operator("self.f(x)", (4, 3, 5), init="self.f = nn.GroupNorm(2, 4)"),
    "instance_norm": Operator("self.f(x)", PICTURE, init="self.f = nn.InstanceNorm2d(2, affine=True)"),
    "batch_norm": Operator("self.f(x)", PICTURE,
                           init="self.f = nn.BatchNorm2d(2); self.f.running_var.data = torch.tensor([1e-12, 3e-5])"),
    "rms_norm": Operator("F.rms_norm(x, (4,)), x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)", ROWS),
    "local_response_norm": Operator("F.local_response_norm(x, 3)", (5, 4, 4)),
    # Layers with memory, attention, tables.
    "lstm": Operator("self.f(x)", ROWS, init="self.f = nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True)"),
    "lstm last state": Operator(
        "self.f(x)[1][0].transpose(0, 1)", ROWS, init="self.f = nn.LSTM(4, 3, batch_first=True)"),
    "gru": Operator("self.f(x)[0]", ROWS, init="self.f = nn.GRU(4, 3, 2, batch_first=True, bidirectional=True)"),
    "rnn": Operator("self.f(x)[0]", ROWS, init="self.f = nn.RNN(4, 3, nonlinearity='relu', batch_first=True)"),
    "lstm of a free length": Operator("self.f(x)[0]", ("1..64", 4), init="self.f = nn.LSTM(4, 3, batch_first=True)"),
    "embedding": Operator("self.f(x), self.f(x).sum(1)", (6,), "int64", vocabulary=10,
                          init="self.f = nn.Embedding(10, 3, padding_idx=0)"),
    "embedding_bag": Operator("self.f(x)", (6,), "int64", vocabulary=10,
                              init="self.f = nn.EmbeddingBag(10, 3, mode='mean')"),
    "attention": Operator("F.scaled_dot_product_attention(x, x, x)", (2, 5, 4)),
    "attention causal": Operator("F.scaled_dot_product_attention(x, x, x, is_causal=True)", (2, 5, 4)),
    "attention bool mask": Operator("F.scaled_dot_product_attention(x, x, x, x[:, :1, :, :1] > 0)", (2, 5, 4)),
    "attention float mask": Operator("F.scaled_dot_product_attention(x, x, x, x[:, :1, :1, :1], scale=0.3)", (2, 5, 4)),
    "attention wholly masked": Operator("F.scaled_dot_product_attention(x, x, x, m)", (2, 5, 4),
                                        before="m = torch.ones(5, 5, dtype=torch.bool).tril(-1)"),
    "attention by hand": Operator(
        "((x @ x.transpose(1, 2)).masked_fill(x[:, :, :1] <= 0, float('-inf')).softmax(2) @ x).nan_to_num(0.0)", ROWS),
    "MultiheadAttention": Operator("self.f(x, x, x, need_weights=False)[0]", ROWS,
                                   init="self.f = nn.MultiheadAttention(4, 2, batch_first=True)"),
    "MultiheadAttention mask": Operator("self.f(x, x, x, key_padding_mask=x[:, :, 0] > 0.5)", ROWS,
                                        init="self.f = nn.MultiheadAttention(4, 2, batch_first=True)"),
    "TransformerEncoderLayer": Operator("self.f(x)", ROWS,
                                        init="self.f = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)"),
    # Products and convolutions.
    "einsum": Operator("torch.einsum('bij,bkj->bik', x, x), torch.einsum('bij->bj', x), "
                       "torch.einsum('bij,j->bi', x, torch.arange(4.0))", ROWS),
    "bmm broadcast": Operator(
        "torch.matmul(x, torch.arange(12.0).reshape(4, 3)), torch.matmul(torch.ones(2, 1, 3, 5), x)",
                              ROWS),
    "addmm": Operator(
        "torch.addmm(self.b, x, self.w, beta=0.5, alpha=-2.0), torch.baddbmm(x[:, :1, None], x[:, :, None], "
                      "x[:, None, :], beta=0.0)",
                      init="self.b = nn.Parameter(torch.randn(3)); self.w = nn.Parameter(torch.randn(6, 3))"),
    "bilinear layer": Operator("self.f(x, x)", init="self.f = nn.Bilinear(6, 6, 3)"),
    "conv groups": _conv("2, 4, 3, 2, 1, 2, groups=2"),
    "conv reflect": _conv("2, 3, 3, padding=2, padding_mode='reflect'"),
    "conv circular": _conv("2, 3, 3, padding=2, padding_mode='circular'"),
    "conv replicate": _conv("2, 3, 3, padding=(1, 2), padding_mode='replicate', bias=False"),
    "conv same": _conv("2, 3, (2, 4), padding='same', dilation=(1, 2)"),
    "conv1d": _conv("2, 3, 4, padding='same'", (2, 9), "Conv1d"),
    "conv3d": _conv("1, 2, 2, 2, 1", (1, 3, 4, 5), "Conv3d"),
    "conv transposed": _conv("2, 4, 3, 2, 1, output_padding=1, groups=2", kind="ConvTranspose2d"),
    "conv transposed dilated": _conv("2, 3, 3, 3, 2, output_padding=2, dilation=2", (2, 7), "ConvTranspose1d"),
    # Numbers moved elsewhere.
    "pad": Operator("F.pad(x, (1, 2, -1, 3), value=-3.5), F.pad(x, (2, 1, 1, 0), 'reflect'), "
                    "F.pad(x, (3, 1, 2, 2), 'replicate'), F.pad(x, (1, 2, 2, 0), 'circular')", PICTURE),
    "roll": Operator("x.roll(2, 1), x.roll((1, -2), (1, 2)), x.flip((1, 2)), x.rot90(1, (1, 2))", ROWS),
    "unfold": Operator("F.unfold(x, (2, 3), dilation=2, padding=1, stride=2), x.unfold(2, 3, 2)", PICTURE),
    "fold": Operator("F.fold(x, (5, 6), (2, 2), padding=1, stride=2)", (8, 12)),
    "pixel_shuffle": Operator("F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 3), F.channel_shuffle(x, 4)", (8, 3, 6)),
    "tril": Operator("x.tril(-1), x.triu(1), x.tril(2)", ROWS),
    "diagonal": Operator(
        "torch.diagonal(x, 1, 1, 2), torch.diag_embed(x[:, 0]), x[:, :4].diagonal(0, 1, 2).sum(1)", ROWS),
    "index_select": Operator("x.index_select(1, self.i), x[:, self.i], x[:, [4, 0, 0]], x[:, -2]", ROWS,
                             init="self.register_buffer('i', torch.tensor([3, 1, 1, 0]))"),
    "gather by argsort": Operator("x.gather(1, x.argsort(stable=True, dim=1))"),
    "take_along_dim": Operator("torch.take_along_dim(x, self.i, 1)",
                               init="self.register_buffer('i', torch.tensor([[3, 1, 1, 0]]))"),
    "scatter": Operator("torch.zeros(x.shape[0], 8).scatter(1, self.i.expand(x.shape[0], 6), x)",
                        init="self.register_buffer('i', torch.tensor([[7, 1, 3, 0, 2, 5]]))"),
    "scatter_add": Operator("torch.ones(x.shape[0], 4).scatter_add(1, self.i.expand(x.shape[0], 6), x)",
                            init="self.register_buffer('i', torch.tensor([[3, 1, 1, 0, 1, 2]]))"),
    "scatter_reduce": Operator("torch.ones(x.shape[0], 4).scatter_reduce(1, self.i.expand(x.shape[0], 6), x, 'amax')",
                               init="self.register_buffer('i', torch.tensor([[3, 1, 1, 0, 1, 2]]))"),
    "index_put": Operator("y", before="y = x.clone(); y[:, self.i] = 2.0; y[:, 1:3] += 1",
                          init="self.register_buffer('i', torch.tensor([3, 0]))"),
    "masked assignment": Operator("y", before="y = x.clone(); y[x < 0.5] = -1.0"),
    "masked_fill": Operator("x.masked_fill(x > 0.5, -7.0), torch.where(x > 0, x, 0.1), torch.where(x != x, 1, x), "
                            "torch.where(x >= 0, 1, 0)"),
    "rows of a mask": Operator("x[x[:, 0] > 0]"),
    "nonzero": Operator("(x > 0).nonzero()"),
    "one_hot": Operator("F.one_hot(x, 10), F.one_hot(x, 10).float() @ torch.eye(10)", (6,), "int64", vocabulary=10),
    "bucketize": Operator("torch.bucketize(x, self.b), torch.bucketize(x, self.b, right=True)",
                          init="self.register_buffer('b', torch.tensor([-1.0, 0.0, 0.5, 37.5]))"),
    "searchsorted": Operator("torch.searchsorted(x.sort(1)[0], x)"),
    "repeat_interleave": Operator(
        "x.repeat_interleave(3, 1), x.repeat(1, 2), x.tile((1, 2)), x.movedim(1, 0).movedim(1, 0)"),
    "unique": Operator("torch.unique(x)"),
    "histc": Operator("torch.stack([torch.histc(x, 4, -1, 1)] * 2)"),
    "meshgrid": Operator("torch.stack(torch.meshgrid(x[0], x[:, 0], indexing='ij'), -1).permute(1, 0, 2)"),
    "split": Operator("x.split([1, 2, 3], 1), x.chunk(4, 1), x.unbind(1)[-1], x.tensor_split(4, 1)[1]"),
    # Kinds of numbers, mixed.
    "int plus float": _whole("x + 0.5, x / 3, x * 1.5, x - torch.ones(6)", "int32"),
    "int division": _whole("x // 3, x % 5, torch.div(x, -4, rounding_mode='trunc'), torch.fmod(x, 7), x % -5"),
    "int division of both": _whole("x[:, :3] // (x[:, 3:].abs() + 1), x[:, :3] % (x[:, 3:].abs() + 1)"),
    "int comparisons": _whole("x > 2.5, x == 16777217, x < x.flip(1), x >= 1e10, x != 0"),
    "int with float comparison": _whole("x == x.float(), x > x.float() - 0.5", "int32"),
    "int constants": _whole("x + 16777217, x - 2147483647, torch.where(x > 3, 16777217, 33554435)"),
    "int constant alone": _whole("torch.full((x.shape[0], 2), 16777219), (x > 3) * 33554435"),
    "int64 beyond int32": _whole("torch.where(x > 3, 3000000000, 5), x + 4294967297"),
    "int32 sums": _whole("x.sum(1), x.cumsum(1), x.sum(1, dtype=torch.int32), x.prod(1)", "int32"),
    "int sums": _whole("x.sum(1), x.cumsum(1), x.abs(), -x, x.sign()"),
    "int means": _whole("x.float().mean(1), x.max(1)[0], x.float().sum(1)"),
    "int times mask": _whole("x * (x > 3), x * (x != 0).long()"),
    "shifts": _whole("x >> 1, x >> 3, torch.bitwise_right_shift(x, 2)", "int32"),
    "left shifts": _whole("x << 1, x << 4", "int32"),
    "bitwise": _whole("x & 12, x | 5, x ^ 3, ~x"),
    "bitwise of int32": _whole("x & 12, x | 5, x ^ x.flip(1), ~x", "int32"),
    "uint8": _whole("x.float() / 255, x.to(torch.int64), x > 127", "uint8"),
    "uint8 sums": _whole("x.sum(1), x.float().mean(1), x.amax(1), x.argmax(1)", "uint8"),
    "uint8 arithmetic": _whole("x + 3, x - 7, x * 2", "uint8"),
    "uint8 halves": _whole("x // 2, x >> 1, x & 15, ~x", "uint8"),
    "int8 sums": _whole("x.sum(1), x.float() * 2, x.amin(1), x.long() + 1000", "int8"),
    "bool arithmetic": _whole("x.sum(1), x & x.flip(1), x | x.flip(1), x ^ x.flip(1), ~x, x.long() + 3", "bool"),
    "bool times float": _whole("x * 2.5, x.float().mean(1), x + 1, x.any(1), x.cumsum(1)",
                               "bool"),
    "bool comparisons": _whole(
        "x > x.flip(1), x == x.flip(1), torch.where(x, 1.5, -2.0), x.logical_xor(x.flip(1))", "bool"),
    "float to bool": Operator(
        "x.bool(), (x != 0).float(), torch.logical_not(x), x.logical_and(x.flip(1)), (x == 0).long()"),
    "float to int": Operator(
        "x.clamp(-100, 100).long(), x.clamp(-9, 9).round().int(), x.clamp(0, 255).to(torch.uint8)"),
    "float to int of the open": Operator("x.long()"),
    "float to half": Operator("x.half().float(), (x.half() * 2).float()"),
    "float to bfloat16": Operator("x.bfloat16().float()"),
    "half weights": Operator("F.linear(x, self.w.float())", init="self.w = nn.Parameter(torch.randn(3, 6).half())"),
    "half computation": Operator("F.linear(x.half(), self.w).float()",
                                 init="self.w = nn.Parameter(torch.randn(3, 6).half())"),
    "half output": Operator("x.half()"),
    "half input": Operator("x * 2", dtype="float16"),
    "double": Operator("x.double().sum(1).float()"),
    "constant 1e30": Operator("x * 1e30, x + 1e30, (x * 1e30) * 1e-30"),
    "constant 1e-40": Operator("x * 1e-40, x + 1e-40, (x * 1e-30 * 1e-10) * 1e38 * 1e2"),
    "denormals made large": Operator("x * 1e38, x * 1e20 * 1e20"),
    "denormals compared": Operator("x > 0, x == 0, (x > 0).long().sum(1), torch.where(x > 0, 1.0, 2.0)"),
    "denormals chosen": Operator("torch.maximum(x, torch.full((6,), 1e-39)) * 1e36, x.abs().argmax(1)"),
    "constants beyond fp32": Operator("x + 16777217, x * 33554433.0, x - 0.1"),
    # Outputs.
    "nested outputs": Operator("{'a': (x + 1, {'b': [x * 2, x[:, 0]]}), 'c': None, 'd': x > 0}"),
    "input as output": Operator("x, x + 1"),
    "input alone": Operator("x"),
    "output twice": Operator("y, y, {'y': y}", before="y = x * 2"),
    "constant output": Operator("x + 1, torch.arange(3).expand(x.shape[0], 3), torch.zeros(x.shape[0], 2)"),
    "scalar per row": Operator("x.sum(1), x[:, 2], x.mean(1, keepdim=True)"),
    "scalar of all": Operator("x + 1, x.shape[0]"),
    "empty output": Operator("x[:, 3:3], x[:, :0].sum(1), x + 1"),
    "transposed output": Operator("x.transpose(1, 2), x[:, ::2], x.expand(2, *x.shape).transpose(0, 1)", ROWS),
    "batch in arithmetic": Operator("x * x.shape[0], x.reshape(x.shape[0], -1).sum(1)"),
    "batch in shapes": Operator("x.reshape(-1, 3).sum(1).reshape(x.shape[0], -1), torch.arange(x.shape[0])"),
    # Sizes of free dimensions.
    "size in arithmetic": Operator("x.sum(1) / x.shape[1], x * (x.shape[1] // 2), x + x.shape[1] % 3", FREE),
    "size in slices": Operator("x[:, : (x.shape[1] + 1) // 2], x[:, -1:], x[:, ::2]", FREE),
    "size in arange": Operator(
        "torch.arange(x.shape[1]) + x.argmax(1, keepdim=True), x * torch.linspace(0, 1, 3).sum()", FREE),
    "size in floats": Operator("x * x.shape[1] ** 0.5, x / float(x.shape[1] * 3 - 1)", FREE),
    "size in pad": Operator("F.pad(x, (0, 64 - x.shape[1])), F.pad(x, (0, x.shape[1] % 4))", FREE),
    "size in pool": Operator("F.adaptive_avg_pool1d(x, 4), F.interpolate(x, size=7, mode='linear')", (2, "1..64")),
    "size in conv": Operator("self.f(x).mean(2)", (2, "1..64"), init="self.f = nn.Conv1d(2, 3, 3, 2, 1)"),
    "size in mask": Operator("(torch.ones(x.shape[1], x.shape[1]).tril() @ x[:, :, None]).squeeze(2)", FREE),
    "size in view": Operator(
        "x.reshape(x.shape[0], x.shape[1] * 2, 2).sum(1), x.flatten(1).shape[1] + x", ("1..64", 4)),
    "size in softmax": Operator("x.softmax(1), x.argmax(1), x.amax(1), x.cumsum(1)", FREE),
    "whole numbers of a free length": _whole(
        "x.sum(1), x.cumsum(1), (x * (x > 2)).sum(1), x.float().mean(1)", shape=FREE),
    # Where the kernel depends on how many numbers there are.
    "argmax of many": Operator("x.argmax(1), x.argmin(1)", (3000,)),
    "argmax of classes": Operator("x.argmax(1), x.max(1)[1]", (21, 5, 7)),
    "argmax of a free length": Operator("x.argmax(1), x.max(1)", FREE),
    "topk values of many": Operator("torch.topk(x, 100, 1)[0]", (700,)),
    "topk places of few": Operator("torch.topk(x, 1, 1)[1]"),
    "topk places of classes": Operator("torch.topk(x, 2, 1)[1]", (21, 3, 3)),
    "topk of a free length": Operator("torch.topk(x, 1, 1)[1]", FREE),
    "sort of a free length": Operator("torch.sort(x, 1)[0]", FREE),
    "softmax of many": Operator("x.softmax(1)", (3000,)),
    "amax of many": Operator("x.amax((1, 2, 3)), x.amin(1), x.sum((2, 3))", (17, 9, 33)),
    "norm of many": Operator("F.layer_norm(x, (3000,)), x.var(1)", (3000,)),
    # Divisions whose rounding decides.
    "remainder by 2": Operator(
        "torch.remainder(x, 2), torch.fmod(x, 0.25), x // 4, torch.div(x, -8, rounding_mode='trunc')"),
    "remainder by 1": Operator("x % 1, x - x.floor(), torch.fmod(x, 1.0), x // 1"),
    "remainder by 3": Operator("x % 3"),
    "floor_divide by 3": Operator("x // 3"),
    "floor_divide by 10": Operator("torch.floor(x / 10), (x / 10).trunc(), (x * 0.1).floor()"),
    "floor_divide of both": Operator("x[:, :3] // (x[:, 3:].abs() + 1)"),
    "trunc div": Operator("torch.div(x, 0.7, rounding_mode='trunc')"),
    "floor div": Operator("torch.div(x, 7.0, rounding_mode='floor')"),
    "int remainder": _whole("x % 5"),
    "int remainder negative": _whole("x % -5"),
    "int fmod": _whole("torch.fmod(x, 7)"),
    "int floor": _whole("x // 3"),
    "int floor negative": _whole("x // -3"),
    "int trunc": _whole("torch.div(x, 4, rounding_mode='trunc')"),
    "int32 floor": _whole("x // 3, x % 7", "int32"),
    "int vocabulary floor": Operator("x // 7, x % 7, x // 2", (6,), "int64", vocabulary=50000),
    "int vocabulary true division": Operator(
        "x / 7, (x / 3).floor().long(), (x / 7) * 7", (6,), "int64", vocabulary=50000),
    "uint8 floor": _whole("x // 3, x % 7", "uint8"),
    "int by size": _whole("x // x.shape[1], x % x.shape[1], torch.arange(x.shape[1]) // 2 + x", shape=FREE),
    # What ordinary probes do not reach.
    "rare constant": _whole("torch.where(x > 500, 16777217, 5)"),
    "rare large constant": _whole("torch.where(x > 500, 3000000000, 5)"),
    "rare float constant": Operator("torch.where(x > 30000.0, 16777217, 5)"),
    "rare large of floats": Operator("torch.where(x > 30000.0, 3000000000, 5)"),
    "table of large": Operator("self.t[x]", (6,), "int64", vocabulary=10,
                               init="self.register_buffer('t', torch.arange(10) ** 9)"),
    "table of large sums": Operator("self.t[x].sum(1), self.t[x] + 1", (6,), "int64", vocabulary=10,
                                    init="self.register_buffer('t', torch.arange(10) * 5000001)"),
    "table of int32": Operator("self.t[x].sum(1)", (6,), "int64", vocabulary=10,
                               init="self.register_buffer('t', (torch.arange(10) * 200000001).int())"),
    "large of comparisons": Operator(
        "(x > 0).long() * 16777217, (x > 1e5).long() + 16777216, (x > 1e5).long() * 3000000000"),
    "counts of large": Operator("(x > 1e5).sum(1) + 16000000, (x > 1e5).int() - 2147483648"),
    "argmax plus large": Operator("x.argmax(1) + 16777216, x.argmax(1) * 16777217"),
    "int to float to int": _whole("(x.float() / 2).clamp(-1e9, 1e9).long()"),
    "bounded cast of large": Operator("(x * 1e6).clamp(-1e9, 1e9).long(), (x * 1e6).clamp(-3e9, 3e9).long()"),
    "bounded narrow": Operator("x.clamp(-1000, 1000).to(torch.uint8)"),
    "bounded half": Operator("x.clamp(-0.9, 0.9).to(torch.int8), x.clamp(-300, 300).int().to(torch.int16)"),
    "cast by argmax": Operator("x.argmax(1).int(), x.argmax(1).float(), x.argmax(1).to(torch.float16)"),
    "denormals scaled": Operator("x.clamp(-1e-10, 1e-10) * 1e20, x.clamp(-1e-10, 1e-10) * 1e18 * 1e18"),
    "denormals divided": Operator("x.clamp(-1, 1) / 1e20 / 1e20 * 1e20 * 1e20"),
    "denormals weighted": Operator("F.linear(x.clamp(-1, 1), self.w) * 1e38",
                                   init="self.w = nn.Parameter(torch.full((2, 6), 1e-39))"),
    "denormals normalized": Operator("F.normalize(x * 1e-30, dim=1, eps=1e-45), x.clamp(min=1e-40).log()"),
    "denormal limit": Operator("x.clamp(min=1e-42) > 0, x >= 1e-42, x == 1e-42, torch.where(x > 1e-42, x, 1e-42) > 0"),
    "equal floats": Operator("x == 0.1, x == 16777217, x > 0.3, x / 3 == x * (1 / 3)"),
    "float64 constants": Operator("x + 0.1, x * 0.1, x > 0.1, torch.where(x > 0, 0.1, 0.7)"),
    "chains": Operator("((x - 1) * 3 + 2) / 7 * 7, (x + 1e4) - 1e4, (x * 3) / 3, x - x * (1 - 1e-7)"),
    "cancelling": Operator("(x + 1e7) - 1e7, (x + 1) ** 2 - x ** 2, x * x - (x + 1) * (x - 1)"),
    "variance by hand": Operator("(x * x).mean(1) - x.mean(1) ** 2"),
    "sign of conv": Operator("(self.f(x) > 0), self.f(x).round()", PICTURE, init="self.f = nn.Conv2d(2, 3, 3)"),
    "double negatives": Operator("1 / (x * 0 - 0.0).abs(), (x * -0.0)"),
    "sqrt of squares": Operator("(x * x).sqrt(), torch.sqrt(x.clamp(min=0)), (x ** 2 + 1e-12) ** 0.5"),
    "hypot": Operator("torch.hypot(x, x.flip(1)), torch.addcmul(x, x, x, value=0.5), torch.lerp(x, x.flip(1), 0.3)"),
    "heaviside": Operator("torch.heaviside(x, torch.full((6,), 0.5)), x.clamp(0, 1).erfinv()"),
    "log_softmax choice": Operator("x.log_softmax(1).argmax(1), x.softmax(1).max(1)[0], (x.softmax(1) > 0.5)"),
    "softmax of masked": Operator(
        "x.masked_fill(x < 0, -1e9).softmax(1), x.masked_fill(x < 0, float('-inf')).softmax(1)"),
    "clamped infinity": Operator(
        "(x * 1e38).clamp(-1e38, 1e38), torch.exp(x).clamp(max=1e9), torch.log(x).clamp(min=-5)"),
    "tanh of infinity": Operator("torch.tanh(torch.exp(x)), torch.sigmoid(1 / x), torch.relu(x / x)"),
    "where over nan": Operator("torch.where(x > 0, torch.log(x), 0.0), torch.where(x > 0, torch.sqrt(x), x)"),
    "comparison of nan": Operator(
        "torch.log(x) > 0, torch.sqrt(x) == torch.sqrt(x), (0 / x) != (0 / x), (1 / x) > 1e30"),
    "nan to bool": Operator("(0 / x).bool(), torch.log(x).isnan(), (x / x).isnan().sum(1), torch.nan_to_num(1 / x)"),
    "nan in sums": Operator("torch.nansum(torch.log(x), 1), torch.nanmean(x / x, 1)"),
    "nan cast": Operator("torch.log(x).clamp(-9, 9).long(), (x / x).clamp(0, 5).int()"),
    "interpolate scale 0.7": _resized("scale_factor=0.7, mode='bilinear'", (1, 10, 10)),
    "interpolate scale 1.99": _resized("scale_factor=(1.99, 0.34), mode='nearest'", (1, 10, 11)),
    "interpolate up 3": _resized("scale_factor=3, mode='nearest'", (1, 4, 5)),
    "interpolate free": _resized("scale_factor=1.7, mode='nearest'", (1, "1..64")),
    "half and back": Operator("x.half().float()"),
    "whole numbers through half": Operator("x.half().float() * 2", (6,), "int64", vocabulary=50),
    "rare nan cast": Operator("torch.log(x + 30000.0).clip(-9, 9).long()"),
    "rare nan to bool": Operator("torch.log(x + 30000.0).bool(), torch.logical_not(torch.log(x + 30000.0))"),
    "rare nan bucket": Operator("torch.bucketize(torch.log(x + 30000.0), self.b)",
                                init="self.register_buffer('b', torch.tensor([-1.0, 0.0, 0.5]))"),
    "rare nan clip": Operator("torch.log(x + 30000.0).clip(-1, 1)"),
    "rare int floor": Operator("(x.clamp(-100000, 100000).long() + 30000) // 3"),
    "rare masked attention": Operator(
        "F.relu(self.f(F.scaled_dot_product_attention(y, y, y, x[:, :1, :, :1] > -30000)))",
                                      (2, 5, 4), before="y = x.clamp(-1, 1)",
        init="self.f = nn.Linear(4, 3); self.f.bias.data += 2"),
    "masked attention shown": Operator("y + F.relu(self.f(y))", (2, 5, 4), init="self.f = nn.Linear(4, 4)",
                                       before="y = x + F.scaled_dot_product_attention(x, x, x, x[:, :1, :, "
        ":1] > -30000)"),
}  # fmt: skip

# Each takes a C++ compiler half a minute: those that it is most likely to compile otherwise.
COMPILED = (
    "remainder", "floor_divide", "floor div", "int division", "int division of both", "round", "topk values",
    "sort values", "denormals compared", "constant 1e-40", "uint8 arithmetic", "int64 beyond int32", "left shifts",
    "float to int of the open", "nan_to_num", "half computation", "softplus", "max_pool places padded", "nearest scale",
    "bicubic antialias", "attention wholly masked", "scatter_add", "size in arithmetic", "output twice",
    "input as output", "mish", "group_norm", "tanh of infinity",
)  # fmt: skip
