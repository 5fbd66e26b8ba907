"""Which nodes are the residual stream itself, and what a dropped token had at a node computed from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tokcc.ir.builder import same_size
from tokcc.ir.space import TokenSpace
from tokcc.ir.value import Value

if TYPE_CHECKING:
    from tokcc.analysis.walk import Walk

__all__ = ["StreamNodes"]

aten = torch.ops.aten
_NORMS = {aten.layer_norm.default, aten.rms_norm.default}
_ROW_BY_ROW = {*_NORMS, aten.linear.default}
_TURNS = {aten.transpose.int, aten.permute.default}


class StreamNodes:
    """The nodes that hold the residual stream: the entry, the cuts, and what residuals add up from there.

    Args:
        entry: The stream's first node, or None.
        cuts: Nodes where something is done to the stream.
    """

    def __init__(self, entry: fx.Node | None, cuts: Sequence[fx.Node]) -> None:
        self._nodes = {*cuts, *([] if entry is None else [entry])}
        # In a post-norm model the stream is what the norm returns, in a pre-norm one the norm only feeds a branch.
        self._post_norm = any(cut.target in _NORMS for cut in cuts if cut is not entry)

    def follow(self, node: fx.Node) -> None:
        """Take a node in when it continues the stream."""
        residual = node.target is aten.add.Tensor or (self._post_norm and node.target in _NORMS)
        if residual and any(n in self._nodes and _alike(n, node) for n in node.all_input_nodes):
            self._nodes.add(node)

    def before(self, walk: Walk, node: fx.Node | None, space: TokenSpace) -> Any:
        """Return what every token of ``space.parent`` had at a node just before some were dropped.

        Returns:
            ``[B, N, ...]``: the stream at the cut, normed and projected as the node does it; None where the node is not
            computed from one token at a time.
        """
        origin = space if space.tail_of is None else space.tail_of[0]
        if node is None or origin.base is None:
            return None
        if node in self._nodes:
            return origin.base
        inner = self.before(walk, node.args[0], space) if node.args and isinstance(node.args[0], fx.Node) else None
        if inner is None:
            return None
        if node.target in _TURNS and len(walk.builder.shape(inner)) == 3:
            return inner  # batch and tokens stand in front, whatever the order at the node
        if node.target not in _ROW_BY_ROW or node.kwargs:
            return None
        rest: Any = fx.node.map_arg(node.args[1:], lambda n: walk.env[n])
        return walk.builder.call(node.target, inner, *(r.handle if isinstance(r, Value) else r for r in rest))


def _alike(first: fx.Node, second: fx.Node) -> bool:
    a, b = first.meta["val"].shape, second.meta["val"].shape
    return len(a) == len(b) and all(same_size(p, q) for p, q in zip(a, b, strict=True))
