"""Shape operations: the token axis at every place, and the ways models write a change of place."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.analysis.cases.places import PLACES
from tests.analysis.layouts import HEADS
from tests.analysis.oracle import Case, Side

__all__ = ["CASES"]

aten = torch.ops.aten


def _squeezes(layout: str) -> Case:
    """An axis of size one in and out again, at every position."""
    place = PLACES[layout]
    words = layout.replace("(b h n)", "X").replace("(b h)", "Y").replace("(b n)", "Z").replace("(n b)", "W").split()
    full = {"X": "(b h n)", "Y": "(b h)", "Z": "(b n)", "W": "(n b)"}
    words = [full.get(word, word) for word in words]
    outs: list[str] = []
    for axis in range(len(words) + 1):
        outs += [" ".join([*words[:axis], "1", *words[axis:]]), layout, layout]

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        placed = place(x)
        results: list[Tensor] = []
        for axis in range(placed.ndim + 1):
            wide = aten.unsqueeze.default(placed, axis)
            results += [wide, aten.squeeze.dim(wide, axis), aten.squeeze.dims(wide, [axis])]
        return tuple(results)

    return Case(f"unsqueeze at {layout}", fn, tuple(outs))


def _places(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(place(x) for place in PLACES.values())


def _back(x: Tensor) -> tuple[Tensor, ...]:
    """From the fused places back to [B, N, C], with the size that is inferred on each axis in turn."""
    batch, tokens, width = x.shape
    fused = PLACES["(b h) n d"](x)
    multi = PLACES["n (b h) d"](x)
    flat = PLACES["(n b) c"](x)
    return (
        aten.view.default(fused, [batch, HEADS, tokens, width // HEADS]).transpose(1, 2).reshape(batch, tokens, width),
        aten.reshape.default(fused, [-1, HEADS, tokens, width // HEADS]).transpose(1, 2).reshape(batch, tokens, -1),
        aten.reshape.default(fused, [batch, -1, tokens, width // HEADS]),
        aten.reshape.default(fused, [batch, HEADS, -1, width // HEADS]),
        aten.view.default(multi, [tokens, batch, width]).transpose(0, 1),
        aten._unsafe_view.default(flat.contiguous(), [tokens, batch, width]),
        aten.view.default(x, [batch, tokens, -1, width // HEADS]),
        aten.view.default(x, [batch, tokens, 2, 2, -1]),
        aten.reshape.default(x, [1, batch, 1, tokens, width]),
        aten.reshape.default(x.unsqueeze(1), [batch, tokens, 1, width]),
    )


_BACK = (
    "b n c",
    "b n c",
    "b h n d",
    "b h n d",
    "b n c",
    "n b c",
    "b n h d",
    "b n 2 2 e",
    "1 b 1 n c",
    "b n 1 c",
)


def _written_otherwise(x: Tensor) -> tuple[Tensor, ...]:
    batch, tokens, width = x.shape
    flat = aten.flatten.using_ints(x, 0, 1)
    heads = aten.unflatten.int(x, 2, [HEADS, width // HEADS])
    return (
        flat,
        aten.t.default(flat),
        aten.unflatten.int(flat, 0, [batch, tokens]),
        heads,
        aten.flatten.using_ints(heads, 2, 3),
        aten.flatten.using_ints(heads, -3, -2),
        aten.movedim.int(heads, 2, 1),
        aten.movedim.intlist(heads, [1, 2], [-2, -1]),
        aten.movedim.int(x, 1, 0),
        aten.permute.default(heads, [0, -2, 1, -1]),
        aten.transpose.int(heads, -3, -2),
        aten.squeeze.default(x.unsqueeze(1).unsqueeze(-1)).reshape(batch, tokens, width),  # B = 1 in the reference
        aten.squeeze.dim(x, 2),
    )


_WRITTEN = (
    "(b n) c",
    "c (b n)",
    "b n c",
    "b n h d",
    "b n c",
    "b (n h) d",
    "b h n d",
    "b d n h",
    "n b c",
    "b h n d",
    "b h n d",
    "b n c",
    "b n c",
)


def _expands(x: Tensor) -> tuple[Tensor, ...]:
    batch, tokens, width = x.shape
    wide = x.unsqueeze(1)
    return (
        aten.expand.default(wide, [batch, 3, tokens, width]),
        aten.expand.default(wide, [-1, 3, -1, -1]),
        aten.expand.default(wide, [4, batch, 3, tokens, width]),
        aten.expand.default(x.mean(-1, keepdim=True), [batch, tokens, 5]),
        aten.repeat.default(x, [1, 1, 2]),
        aten.repeat.default(wide, [3, 1, 2, 1, 1]),
        aten.expand.default(wide, [batch, 3, tokens, width])
        .reshape(batch * 3, tokens, width)
        .reshape(batch, 3, tokens, width),
    )


_EXPANDS = ("b 3 n c", "b 3 n c", "4 b 3 n c", "b n 5", "b n e", "3 b 2 n c", "b 3 n c")


def _cats(x: Tensor, table: Tensor, shared: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    """Along other axes: with itself, and with per-sample and shared tables of all tokens."""
    batch, tokens, _ = x.shape
    heads = PLACES["b h n d"](x)
    first, second = heads[..., :2], heads[..., 2:]
    return (
        aten.cat.default([x, x * 2], -1),
        aten.cat.default([x, table], 2),
        aten.cat.default([table, x], 2),
        aten.cat.default([x, shared.expand(batch, tokens, 8)], 2),
        aten.cat.default([-second, first], -1),
        aten.cat.default([heads, other.expand(batch, 1, tokens, 4)], 1),
        aten.cat.default([x.transpose(1, 2), table.transpose(1, 2)], 1),
    )


def _head_and_rest(x: Tensor, cos: Tensor) -> tuple[Tensor, ...]:
    """Rotary attention of DINOv3: the special tokens stay, the others turn by a table of theirs."""
    tokens = x.shape[1]
    heads = PLACES["b h n d"](x)
    special, patches = heads[:, :, :2], heads[:, :, 2:]
    split = aten.split_with_sizes.default(heads, [2, tokens - 2], 2)
    turned = split[1] * cos[2:]
    return (
        special * 2,
        aten.cat.default([special, patches * 3], 2),
        aten.cat.default([split[0], turned], -2),
        aten.cat.default([aten.cat.default([split[0], turned], -2), heads], -1),
        aten.cat.default([x[:, 0:1], x[:, 1:2], x[:, 2:] * 2], 1),
        torch.sigmoid(aten.cat.default([x[:, :1], x[:, 1:] * 0.5], 1)) + x,
    )


def _stacked(x: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    return (
        aten.stack.default([x, x * 2, x + table], 1),
        aten.stack.default([x.transpose(1, 2), x.transpose(1, 2)], -1),
        aten.stack.default([x], 0),
    )


CASES: list[Case] = [
    Case(
        "places",
        _places,
        tuple(PLACES),
        kinds=(("drop",), ("shared",), ("merge",), ("padded",), ("drop", "merge")),
        dynamic=True,
    ),
    Case("places of [N, B, C]", lambda x: _places(x.transpose(0, 1)), tuple(PLACES), layout="n b c"),
    Case("back from fused places", _back, _BACK, dynamic=True),
    Case("views written otherwise", _written_otherwise, _WRITTEN),
    Case("expand and repeat", _expands, _EXPANDS),
    Case(
        "cat along channels",
        _cats,
        ("b n e", "b n e", "b n e", "b n e", "b h n d", "b 3 n d", "b e n"),
        {"table": Side("b n c"), "shared": Side("1 n c"), "other": Side("1 1 n d")},
    ),
    Case(
        "head and rest",
        _head_and_rest,
        ("b h 2 d", "b h n d", "b h n d", "b h n e", "b n c", "b n c"),
        {"cos": Side("n d")},
        kinds=(("drop",), ("shared",), ("merge",), ("merge", "drop")),
        dynamic=True,
    ),
    Case("stack", _stacked, ("b 3 n c", "b c n 2", "1 b n c"), sides={"table": Side("1 n c")}, dynamic=True),
    *(_squeezes(layout) for layout in PLACES),
]
