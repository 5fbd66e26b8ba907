"""Where tokens come from: patches of an image, or words."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from tokcc.ir.program import Program
from tokcc.ir.reach import made_of

__all__ = ["laid_out", "looked_up"]

aten = torch.ops.aten
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default}


def laid_out(entry: fx.Node, tokens: Any, special: int) -> tuple[int, ...] | None:
    """Return the sizes of the axes along which tokens lie, row by row, where a convolution makes them.

    Args:
        entry: Where the stream begins.
        tokens: Number of tokens there: int or ``SymInt``.
        special: How many of them are class tokens and the like.
    """
    if not isinstance(tokens, int):
        return None
    before = made_of([entry])
    for node in reversed(list(entry.graph.nodes)):
        if node in before and node.target in _CONVOLUTIONS:
            sizes = tuple(node.meta["val"].shape[2:])
            if all(isinstance(size, int) for size in sizes) and math.prod(sizes) == tokens - special:
                return sizes
    return None


def looked_up(program: Program, entry: fx.Node) -> bool:
    """Return True where the stream is made of a table's rows by ids that the caller gives."""
    given = {node for node in program.user_inputs if not node.meta["val"].is_floating_point()}

    def is_size(node: fx.Node) -> bool:
        return node.target is aten.sym_size.int  # of positions, which are counted and not given

    tables = (node for node in made_of([entry]) if node.target is aten.embedding.default)
    return any(made_of([ids], is_size) & given for node in tables if isinstance(ids := node.args[1], fx.Node))
