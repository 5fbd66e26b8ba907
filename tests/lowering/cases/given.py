"""Inputs and bodies that the cases are made of."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from tests.lowering.harness import Body, Input

__all__ = [
    "BOOL",
    "BOOL2",
    "INT",
    "INT2",
    "NONZERO",
    "POSITIVE",
    "ROW",
    "STATIC",
    "X",
    "Y",
    "fixed",
    "of",
    "parts",
    "weighted",
]

X = Input(("B", "N", 4))
Y = Input(("B", "N", 4))
ROW = Input((4,))
POSITIVE = Input(("B", "N", 4), "positive")
INT, INT2, NONZERO = Input(("B", "N"), "int"), Input(("B", 1), "int"), Input(("B", "N"), "nonzero")
BOOL, BOOL2 = Input(("B", "N"), "bool"), Input(("B", 1), "bool")
STATIC = Input((2, 3, 4))


def fixed(*shape: int, seed: int = 0) -> Tensor:
    """A parameter."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of(target: Any, *args: Any, **kwargs: Any) -> Body:
    """``target(*inputs, *args)``."""
    return lambda b, *handles: b.call(target, *handles, *args, **kwargs)


def parts(target: Any, count: int, *args: Any, **kwargs: Any) -> Body:
    """All results of an operation with several."""

    def body(b: Any, *handles: Any) -> tuple[Any, ...]:
        made = b.call(target, *handles, *args, **kwargs)
        return tuple(b.call(operator.getitem, made, i) for i in range(count))

    return body


def weighted(target: Any, *shapes: tuple[int, ...], **kwargs: Any) -> Body:
    """``target(x, *parameters)``: weights that are stored, not fed."""

    def body(b: Any, x: Any) -> Any:
        own = [b.constant(f"w{i}", fixed(*shape, seed=i).to(b.dtype(x))) for i, shape in enumerate(shapes)]
        return b.call(target, x, *own, **kwargs)

    return body
