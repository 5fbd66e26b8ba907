"""Runs of slots whose length is a size of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokcc.ir.builder import Builder, same_size

__all__ = ["prefix", "run_from", "run_of"]


def run_of(b: Builder, x: Any, axis: int, start: Any, stop: Any) -> Any:
    """Return the slots from ``start`` to ``stop`` of one axis, which has at least so many.

    Not a slice: of that torch does not believe that the slots are there, and gives the result a length of which nothing
    is known, so that every shape check behind it takes longer.
    """
    if isinstance(start, int) and start == 0 and stop is None:
        return x
    end = b.size(x, axis) if stop is None else stop
    return b.call(torch.ops.aten.index_select.default, x, axis, b.arange(end, x, start=start))


def run_from(b: Builder, x: Any, axis: int, start: Any, count: Any) -> Any:
    """Return ``count`` slots of one axis from ``start`` on.

    Its length is ``count`` itself, and no difference of sizes that torch would have to prove equal to it.
    """
    place = b.call(torch.ops.aten.add.Scalar, b.arange(count, x), start)
    return b.call(torch.ops.aten.index_select.default, x, axis, place)


def prefix(b: Builder, x: Any, axis: int, count: Any) -> Any:
    """Return the first ``count`` slots of one axis, which has at least so many; its length is ``count`` itself."""
    if same_size(b.shape(x)[axis], _known(count)):
        return x
    return b.call(torch.ops.aten.narrow.default, x, axis, 0, count)


def _known(size: Any) -> Any:
    """Return a size for comparison only."""
    return size.meta["val"] if isinstance(size, fx.Node) else size
