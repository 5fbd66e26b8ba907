"""Selecting, slicing, splitting, table look-ups."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.analysis.cases.places import PLACES
from tests.analysis.oracle import Case, Side

__all__ = ["CASES"]

aten = torch.ops.aten


def _protected(x: Tensor) -> tuple[Tensor, ...]:
    """Positions below the protected prefix, at several places of the token axis."""
    heads = PLACES["b h n d"](x)
    tokens = x.shape[1]
    return (
        aten.select.int(x, 1, 0),
        aten.select.int(x, 1, 1),
        aten.select.int(x, -2, -tokens) if isinstance(tokens, int) else aten.select.int(x, -2, 0),
        aten.select.int(x.transpose(0, 1), 0, 1),
        aten.select.int(heads, 2, 0),
        aten.slice.Tensor(x, 1, 0, 1),
        aten.slice.Tensor(x, 1, 0, 2),
        aten.slice.Tensor(x, 1, 1, 2),
        aten.slice.Tensor(heads, -2, None, 2),
        aten.slice.Tensor(x, 1, 0, 9223372036854775807),
        aten.slice.Tensor(x, 1, 0, tokens),
        aten.select.int(aten.slice.Tensor(x, 1, 1, 9223372036854775807), 1, 0),
    )


_PROTECTED = (
    "b c",
    "b c",
    "b c",
    "b c",
    "b h d",
    "b 1 c",
    "b 2 c",
    "b 1 c",
    "b h 2 d",
    "b n c",
    "b n c",
    "b c",
)


def _channels(x: Tensor, picks: Tensor) -> tuple[Tensor, ...]:
    """Along an axis without tokens, wherever the tokens are."""
    batch, tokens, width = x.shape
    fused = x.reshape(batch, tokens, 2, width // 2)
    parts = aten.split_with_sizes.default(x, [3, 5], -1)
    again = aten.split.sizes(x, [3, 5], 2)
    equal = aten.split.Tensor(x.transpose(1, 2), 3, 1)
    chunks = aten.chunk.default(x, 2, -1)
    taken = aten.unbind.int(fused, 2)
    return (
        *parts,
        *again,
        *equal,
        *chunks,
        *taken,
        aten.select.int(x, 2, 3),
        aten.select.int(fused, -2, -1),
        aten.slice.Tensor(x, 2, 1, 7, 2),
        aten.slice.Tensor(x, -1, -3, 9223372036854775807),
        aten.index_select.default(x, 2, picks),
        aten.index_select.default(x.transpose(1, 2), 1, picks),
        aten.index.Tensor(x, [None, None, picks]),
        aten.index.Tensor(x.transpose(1, 2), [None, picks]),
    )


_CHANNELS = (
    *("b n e",) * 4,
    *("b e n",) * 3,
    *("b n d",) * 4,
    "b n",
    "b n d",
    "b n e",
    "b n e",
    "b n 3",
    "b 3 n",
    "b n 3",
    "b 3 n",
)


def _tables(x: Tensor, table: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Rows looked up by what is computed from a token; ``gather`` along channels."""
    best = aten.argmax.default(x, 2)
    place = x.argmax(-1, keepdim=True)
    return (
        aten.embedding.default(table, best),
        aten.embedding.default(table, best, -1, False, False),
        aten.gather.default(x, 2, place),
        aten.gather.default(x.transpose(1, 2), 1, place.transpose(1, 2)),
        aten.gather.default(weight, 2, place),
        aten.gather.default(x, -1, weight.argmax(-1, keepdim=True)),
    )


CASES: list[Case] = [
    Case(
        "protected positions",
        _protected,
        _PROTECTED,
        kinds=(("drop",), ("shared",), ("merge",), ("padded",), ("drop", "merge"), ("merge", "drop")),
        dynamic=True,
    ),
    Case("along channels", _channels, _CHANNELS, {"picks": Side("3", "index")}),
    Case(
        "look-ups",
        _tables,
        ("b n c", "b n c", "b n 1", "b 1 n", "b n 1", "b n 1"),
        {"table": Side("8 c"), "weight": Side("b n c")},
        dynamic=True,
    ),
]
