"""Sums, means, extrema and norms: over channels row by row, over tokens only as a mean of what is left."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.analysis.cases.places import PLACES
from tests.analysis.oracle import Case, Kind, Side

__all__ = ["CASES"]

aten = torch.ops.aten
EVERY: tuple[tuple[Kind, ...], ...] = (
    ("drop",),
    ("shared",),
    ("merge",),
    ("padded",),
    ("drop", "merge"),
    ("merge", "drop"),
    ("merge", "merge"),
)


def _over_channels(x: Tensor) -> tuple[Tensor, ...]:
    heads = PLACES["b h n d"](x)
    fused = PLACES["(b h) n d"](x)
    return (
        aten.mean.dim(x, [2]),
        aten.mean.dim(x, [-1], True),
        aten.mean.dim(heads, [1]),
        aten.mean.dim(heads, [1, -1], True),
        aten.sum.dim_IntList(x, [2]),
        aten.sum.dim_IntList(fused, [-1], True),
        aten.amax.default(x, [2]),
        aten.amin.default(heads, [-1], True),
        aten.argmax.default(x, 2),
        aten.argmin.default(x, -1, True),
        aten.any.dim(x > 1, 2),
        aten.all.dim(x > -1, -1, True),
        aten.linalg_vector_norm.default(x, 2, [2], True),
        aten.norm.ScalarOpt_dim(x, 2, [-1], True),
        x / aten.linalg_vector_norm.default(x, 2, [-1], True),
    )


_OVER_CHANNELS = (
    "b n",
    "b n 1",
    "b n d",
    "b 1 n 1",
    "b n",
    "(b h) n 1",
    "b n",
    "b h n 1",
    "b n",
    "b n 1",
    "b n",
    "b n 1",
    "b n 1",
    "b n 1",
    "b n c",
)


def _mean_pooling(x: Tensor) -> tuple[Tensor, ...]:
    heads = PLACES["b h n d"](x)
    return (
        aten.mean.dim(x, [1]),
        aten.mean.dim(x, [1], True),
        aten.mean.dim(x.transpose(0, 1), [0]),
        aten.mean.dim(x.transpose(1, 2), [-1]),
        aten.mean.dim(heads, [2]),
        aten.mean.dim(PLACES["b h d n"](x), [-1], True),
        aten.mean.dim(PLACES["b n h d"](x), [1]),
        aten.layer_norm.default(aten.mean.dim(x, [1]), [8]),
        aten.mean.dim(aten.mean.dim(x, [1]), [-1]),
    )


_MEAN_POOLING = ("b c", "b 1 c", "b c", "b c", "b h d", "b h d 1", "b h d", "b c", "b")


def _tail_pooling(x: Tensor) -> tuple[Tensor, ...]:
    """The mean of all tokens but the special ones (BEiT, timm's ``avg``)."""
    patches = aten.slice.Tensor(x, 1, 1, 9223372036854775807)
    return aten.mean.dim(patches, [1]), aten.mean.dim(aten.layer_norm.default(patches, [8]), [1], True)


def _masked_pooling(x: Tensor, mask: Tensor, flags: Tensor) -> tuple[Tensor, ...]:
    """Sentence pooling in the ways that libraries write it."""
    wide = mask.unsqueeze(-1).expand(x.shape).to(x.dtype)
    thin = mask.unsqueeze(-1)
    return (
        aten.sum.dim_IntList(x * wide, [1]) / torch.clamp(aten.sum.dim_IntList(wide, [1]), min=1e-9),
        aten.sum.dim_IntList(x * thin, [1]) / aten.sum.dim_IntList(mask, [1], True),
        aten.sum.dim_IntList(x * thin, [1]) / aten.sum.dim_IntList(mask, [1]).unsqueeze(-1),
        aten.sum.dim_IntList(x * thin, [1], True) / (aten.sum.dim_IntList(thin, [1], True) + 1e-6),
        aten.sum.dim_IntList(aten.masked_fill.Scalar(x, (~flags).unsqueeze(-1), 0.0), [1])
        / aten.clamp_min.default(aten.sum.dim_IntList(flags.float(), [1], True), 1e-9),
        aten.sum.dim_IntList(x * thin * 3.0, [1]) / aten.sum.dim_IntList(thin, [1]),
    )


def _product_pooling(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """A sum whose divisor is computed from the stream itself, so that both are sums over the same tokens."""
    gate = torch.sigmoid(x[..., :1]) * mask
    return ((x * gate).sum(1) / gate.sum(1), (x * gate).sum(1) / torch.clamp(gate.sum(1), min=1e-9))


CASES: list[Case] = [
    Case("reductions over channels", _over_channels, _OVER_CHANNELS),
    Case("mean pooling", _mean_pooling, _MEAN_POOLING, commutes=False, kinds=EVERY, dynamic=True),
    Case(
        "mean of the patches",
        _tail_pooling,
        ("b c", "b 1 c"),
        commutes=False,
        kinds=(("drop",), ("shared",), ("merge",), ("merge", "drop")),
    ),
    Case(
        "masked mean",
        _masked_pooling,
        ("b c", "b c", "b c", "b 1 c", "b c", "b c"),
        {"mask": Side("b n", "count"), "flags": Side("b n", "bool")},
        commutes=False,
        kinds=EVERY,
        dynamic=True,
    ),
    Case(
        "weighted mean",
        _product_pooling,
        ("b c", "b c"),
        {"mask": Side("b n 1", "count")},
        commutes=False,
        kinds=EVERY,
    ),
]
