"""Skip connections around a reduction: a stream value with all tokens meets one with fewer.

The first ``alias`` marks where the reductions go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.analysis.cases.places import PLACES
from tests.analysis.cases.reduction import EVERY
from tests.analysis.oracle import Case, Side

__all__ = ["CASES"]

aten = torch.ops.aten
sdpa = aten.scaled_dot_product_attention.default


def _linear_skips(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """What is around the cut is linear, so that merging before and after it is the same."""
    y = aten.alias.default(x)
    around = aten.linear.default(x, weight)
    return (
        y + x,
        x - y * 0.5,
        aten.cat.default([y, around], -1),
        y * 2 + around,
        (y + x).transpose(1, 2) + x.transpose(1, 2),
        aten.alias.default(y),
        aten.type_as.default(y, x.double()),
    )


def _at(layout: str) -> Case:
    place = PLACES[layout]

    def fn(x: Tensor) -> Tensor:
        y = aten.alias.default(x)
        return place(y) + place(x)

    kinds = (("drop",), ("shared",), ("merge",), ("drop", "merge"), ("merge", "merge"))
    return Case(f"skip at {layout}", fn, (layout,), kinds=kinds)


def _tail(x: Tensor) -> Tensor:
    y = aten.alias.default(x)
    return aten.slice.Tensor(y, 1, 0, 2).sum(1) + aten.mean.dim(aten.slice.Tensor(x, 1, 0, 1), [1])


def _scores(x: Tensor) -> Tensor:
    """A float made from the stream that is no residual: similarities of all tokens, brought down on both axes."""
    y = aten.alias.default(x)
    return aten.matmul.default(y, y.transpose(1, 2)) + aten.matmul.default(x, x.transpose(1, 2))


def _indices(x: Tensor, table: Tensor) -> Tensor:
    """Integers of the stream are taken from the representatives."""
    best = aten.argmax.default(x, 2)
    y = aten.alias.default(x)
    return y + aten.embedding.default(table, best)


CASES: list[Case] = [
    Case(
        "skips",
        _linear_skips,
        ("b n c", "b n c", "b n e", "b n c", "b c n", "b n c", "b n c"),
        {"weight": Side("c c", "weight")},
        kinds=(
            ("drop",),
            ("shared",),
            ("merge",),
            ("padded",),
            ("drop", "merge"),
            ("merge", "drop"),
            ("merge", "merge"),
        ),
        dynamic=True,
    ),
    *(_at(layout) for layout in PLACES),
    Case("prefix around", _tail, ("b c",), commutes=False, kinds=EVERY),
    Case("scores around", _scores, ("b n n",), kinds=(("drop",), ("shared",))),
    Case("indices around", _indices, ("b n c",), {"table": Side("8 c")}, kinds=(("drop",), ("shared",))),
]
