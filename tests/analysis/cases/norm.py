"""Normalisations over channels."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.analysis.cases.places import PLACES
from tests.analysis.oracle import Case, Side

__all__ = ["CASES"]

aten = torch.ops.aten


def _norms(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
    variance = var.abs() + 0.5
    places = [PLACES[name](x) for name in ("b n c", "n b c", "(n b) c", "b 1 n c")]
    return (
        *(aten.layer_norm.default(placed, [8], w, b) for placed in places),
        aten.layer_norm.default(x, [8]),
        aten.layer_norm.default(PLACES["b n h d"](x), [2, 4]),
        aten.layer_norm.default(PLACES["(b h) n d"](x), [4], None, None, 1e-3),
        aten.rms_norm.default(x, [8], w),
        aten.rms_norm.default(PLACES["b h n d"](x), [4], w[:4], 1e-6),
        aten.batch_norm.default(x.transpose(1, 2), w, b, mean, variance, False, 0.1, 1e-5, False),
        aten.batch_norm.default(PLACES["(b n) c"](x), w, b, mean, variance, False, 0.1, 1e-5, False),
        aten.group_norm.default(PLACES["(b n) c"](x), 2, w, b),
    )


CASES: list[Case] = [
    Case(
        "norms over channels",
        _norms,
        (
            "b n c",
            "n b c",
            "(n b) c",
            "b 1 n c",
            "b n c",
            "b n h d",
            "(b h) n d",
            "b n c",
            "b h n d",
            "b c n",
            "(b n) c",
            "(b n) c",
        ),
        {name: Side("c") for name in ("w", "b", "mean", "var")},
        dynamic=True,
    ),
]
