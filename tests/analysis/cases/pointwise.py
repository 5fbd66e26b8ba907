"""Elementwise operations, broadcasting, softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.analysis.cases.places import PLACES, side_layouts
from tests.analysis.cases.reduction import EVERY
from tests.analysis.oracle import Case, Kind, Side

__all__ = ["CASES"]

aten = torch.ops.aten
SOME: tuple[tuple[Kind, ...], ...] = (("drop",), ("merge",), ("drop", "merge"))

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": aten.gelu.default,
    "silu": aten.silu.default,
    "mish": aten.mish.default,
    "softplus": aten.softplus.default,
    "relu": aten.relu.default,
    "leaky_relu": aten.leaky_relu.default,
    "hardtanh": aten.hardtanh.default,
    "hardswish": aten.hardswish.default,
    "elu": aten.elu.default,
    "clamp": lambda x: aten.clamp.default(x, -0.5, 0.5),
    "clamp_min": lambda x: aten.clamp_min.default(x, -0.5),
    "pow": lambda x: aten.pow.Tensor_Scalar(x, 2),
    "neg": aten.neg.default,
    "tanh": aten.tanh.default,
    "sigmoid": aten.sigmoid.default,
    "erf": aten.erf.default,
    "rsub": lambda x: aten.rsub.Scalar(x, 1.0),
    "add_number": lambda x: aten.add.Tensor(x, 3),
    "div_number": lambda x: aten.div.Tensor(x, 3),
    "scalar_add": lambda x: aten.add.Scalar(x, 3),
    "compare": lambda x: aten.gt.Scalar(x, 0.0),
    "to_copy": lambda x: aten._to_copy.default(x, dtype=torch.float64),
    "to_dtype": lambda x: aten.to.dtype(x, torch.float64),
    "clone": aten.clone.default,
    "contiguous": aten.contiguous.default,
    "detach": aten.detach.default,
    "dropout": lambda x: aten.dropout.default(x, 0.5, False),
    "lift_fresh_copy": aten.lift_fresh_copy.default,
    "zeros_like": aten.zeros_like.default,
    "ones_like": aten.ones_like.default,
    "full_like": lambda x: aten.full_like.default(x, 2.5),
    "empty_like": lambda x: aten.empty_like.default(x) * 0 == 5,
}

BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": aten.add.Tensor,
    "add_alpha": lambda x, y: aten.add.Tensor(x, y, alpha=2),
    "sub_reversed": lambda x, y: aten.sub.Tensor(y, x),
    "mul": aten.mul.Tensor,
    "maximum": aten.maximum.default,
    "where_self": lambda x, y: aten.where.self(y > 0, x, y),
    "where_other": lambda x, y: aten.where.ScalarOther(y > 0, x, -5.0),
    "where_first": lambda x, y: aten.where.ScalarSelf(y > 0, -5.0, x),
    "masked_fill": lambda x, y: aten.masked_fill.Scalar(x, y > 0, -5.0),
    "masked_fill_tensor": lambda x, y: aten.masked_fill.Tensor(x, y > 0, torch.full((), -5.0)),
    "and": lambda x, y: aten.__and__.Tensor(x > 0, y > 0),
    "or": lambda x, y: aten.__or__.Tensor(x > 0, y > 0),
    "xor": lambda x, y: aten.__xor__.Tensor(x > 0, y > 0),
    "logical_and": lambda x, y: aten.logical_and.default(x > 0, y > 0),
}


def _unary(layout: str) -> Case:
    place = PLACES[layout]

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        placed = place(x)
        return tuple(op(placed) for op in UNARY.values())

    return Case(f"unary at {layout}", fn, (layout,) * len(UNARY), kinds=(("drop",), ("merge",)))


def _binary(layout: str) -> Case:
    """Every broadcast form of a side operand, and the operation by turns."""
    place = PLACES[layout]
    forms = [form for form in side_layouts(layout) if form]
    ops = list(BINARY.values())

    def fn(x: Tensor, **sides: Tensor) -> tuple[Tensor, ...]:
        placed = place(x)
        results = [ops[i % len(ops)](placed, side) for i, side in enumerate(sides.values())]
        return (*results, placed + torch.full((), 2.0), placed + placed, placed * torch.cos(placed))

    sides = {f"s{i}": Side(form) for i, form in enumerate(forms)}
    return Case(
        f"sides at {layout}",
        fn,
        (layout,) * (len(forms) + 3),
        sides,
        kinds=SOME[:2] if list(PLACES).index(layout) % 2 else SOME[1:],
        dynamic=layout in ("b n c", "(b h) n d"),
    )


def _every_op(layout: str, side: str) -> Case:
    place = PLACES[layout]

    def fn(x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        placed = place(x)
        return tuple(op(placed, s) for op in BINARY.values())

    return Case(f"binary at {layout} with {side}", fn, (layout,) * len(BINARY), {"s": Side(side)})


def _softmax_channels(layout: str) -> Case:
    """Softmax over an axis without tokens is row-wise."""
    place = PLACES[layout]
    letters = layout.split()
    axis = letters.index("c") if "c" in letters else letters.index("d")

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        placed = place(x)
        return (
            aten.softmax.int(placed, axis),
            aten._softmax.default(placed, axis - placed.ndim, False),
            aten.log_softmax.int(placed, axis),
            aten._log_softmax.default(placed, axis, False),
        )

    return Case(f"softmax over channels at {layout}", fn, (layout,) * 4)


def _softmax_tokens(layout: str, sides: dict[str, Side]) -> Case:
    """Softmax over tokens: dropped ones are missing from the sum, merged ones count by their size."""
    place = PLACES[layout]
    axis = layout.replace("(b h)", "g").split().index("n")
    out = layout.replace("n", "p")

    def fn(x: Tensor, **given: Tensor) -> Tensor:
        logits = place(x)
        for name, side in given.items():
            logits = logits.masked_fill(~side, -torch.inf) if name.startswith("mask") else logits + side
        return aten.softmax.int(logits, axis)

    return Case(f"softmax over tokens at {layout} {list(sides)}", fn, (out,), sides, commutes=False, kinds=EVERY)


def _probability_arithmetic(x: Tensor, m: Tensor) -> Any:
    probs = (x @ x.transpose(1, 2)).softmax(-1)
    return probs * 1.0, probs.to(torch.float64), probs.unsqueeze(1)


_MASK = Side("b n 1", "bool")
CASES: list[Case] = [
    *(_unary(layout) for layout in PLACES),
    *(_binary(layout) for layout in PLACES),
    _every_op("b n c", "b n 1"),
    _every_op("b n c", "n c"),
    _every_op("b h n d", "b 1 n 1"),
    _every_op("b h n d", "n d"),
    _every_op("(b h) n d", "(b h) n 1"),
    _every_op("(n b) c", "(n b) 1"),
    *(_softmax_channels(layout) for layout in PLACES if "(" not in layout),
    _softmax_tokens("b n c", {}),
    _softmax_tokens("b n c", {"mask": _MASK, "bias": Side("n 1")}),
    _softmax_tokens("b h n d", {"bias": Side("1 h n 1")}),
    _softmax_tokens("b c n", {"mask": Side("b 1 n", "bool")}),
    _softmax_tokens("b h d n", {}),
    _softmax_tokens("(b h) n d", {}),
    _softmax_tokens("(b h) d n", {"bias": Side("n")}),
]
