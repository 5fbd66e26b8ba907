"""Which nodes a call computes, where it chooses between two ways by its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from tokcc.analysis.sizes import number
from tokcc.ir.program import Program

__all__ = ["computed"]


def computed(program: Program, bindings: Mapping[Any, int]) -> set[fx.Node]:
    """Return the nodes that the outputs need at given sizes: of each ``choose_by_size`` the side that is taken."""
    found: set[fx.Node] = set()
    work = [value for value in program.output_values if isinstance(value, fx.Node)]
    while work:
        node = work.pop()
        if node in found:
            continue
        found.add(node)
        if node.target is torch.ops.tokcc.choose_by_size.default:
            work.append(_taken(node, bindings))
        else:
            work += node.all_input_nodes
    return found


def _taken(node: fx.Node, bindings: Mapping[Any, int]) -> fx.Node:
    otherwise, inside, sizes, low, high = node.args
    assert isinstance(otherwise, fx.Node)
    assert isinstance(inside, fx.Node)
    bounds: Any = zip(sizes, low, high, strict=True)  # type: ignore[arg-type]  # lists
    fits = all(least <= number(_value(size), bindings) <= most for size, least, most in bounds)
    return inside if fits else otherwise


def _value(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, fx.Node) else size
