"""What runs over tokens in their order: reversals, causal convolutions, recurrences; and products with letters."""

from __future__ import annotations

import torch
from torch import Tensor

import tokcc.kernels
from tests.analysis.oracle import Case, Side

__all__ = ["CASES"]

aten = torch.ops.aten
assert tokcc.kernels is not None
recurrence = torch.ops.tokcc.recurrence.default
conv1d = aten.conv1d.default


def _reversals(x: Tensor) -> tuple[Tensor, ...]:
    back = aten.flip.default(x, [1])
    return (
        back,
        aten.flip.default(back, [-2]),
        aten.flip.default(back.transpose(1, 2) * 2, [1, -1]),
        aten.flip.default(x, [2]),
    )


def _convolutions(x: Tensor, w: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    n, own = x.shape[1], x.transpose(1, 2)
    wide = conv1d(own, w, bias, [1], [3], [1], 8)
    behind = aten.flip.default(conv1d(aten.flip.default(own, [2]), w, bias, [1], [3], [1], 8)[..., :n].relu(), [2])
    return (
        wide[..., :n],
        aten.slice.Tensor(aten.silu.default(wide), 2, 0, n),
        behind,
        conv1d(aten.constant_pad_nd.default(own, [3, 0]), w, None, [1], [0], [1], 8),
        conv1d(aten.pad.default(own, [3, 0], "constant", 0.0), w, None, [1], [0], [1], 8),
        conv1d(aten.pad.default(own, [6, 0]), w, bias, [1], [0], [2], 8),
        conv1d(aten.pad.default(own, [5, 1]), w, bias, [1], [0], [1], 8)[..., 2 : n + 2],
    )


def _recurrences(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    decay = torch.exp(-x.abs())
    turned = x.transpose(0, 1)
    back = aten.flip.default(recurrence(aten.flip.default(decay, [1]), aten.flip.default(x, [1]), 1), [1])
    return (
        recurrence(decay, x, 1),
        recurrence(torch.exp(-turned.abs()), turned, -3),
        back,
        recurrence(torch.sigmoid(w) * aten.ones_like.default(x), x, 1),
        recurrence(decay, x, 2),
        recurrence(decay, x, 1, x.mean(1)),
        recurrence(torch.exp(-turned.abs()), turned, 0, x.mean(1) * w),
    )


CASES: list[Case] = [
    Case(
        "reversals",
        _reversals,
        ("b n c", "b n c", "b c n", "b n c"),
        commutes=False,
        kinds=(("drop",), ("shared",), ("drop", "drop")),
        dynamic=True,
    ),
    Case(
        "causal convolutions",
        _convolutions,
        ("b c n",) * 7,
        {"w": Side("c 1 d", "weight"), "bias": Side("c")},
        commutes=False,
        kinds=(("drop",), ("shared",), ("drop", "drop")),
        dynamic=True,
    ),
    Case(
        "recurrences",
        _recurrences,
        ("b n c", "n b c", "b n c", "b n c", "b n c", "b n c", "n b c"),
        {"w": Side("c")},
        commutes=False,
        kinds=(("drop",), ("shared",), ("padded",), ("drop", "padded")),
        dynamic=True,
    ),
]
