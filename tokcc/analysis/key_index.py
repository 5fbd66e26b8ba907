"""Finding an indexer: small queries and keys by which a layer chooses the keys that its attention sees.

DeepSeek Sparse Attention (DeepSeek-V3.2) rates each key for each query by ``sum over heads j of g_j relu(q_j . k)``,
with keys and queries of their own and a gate of the query, and lets the attention see the ``k`` best. In the graph that
is a mask that is made of a second past, joined to what each call adds to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.ir.reach import made_of

__all__ = ["Joined", "KeyIndex", "find_key_index"]

aten = torch.ops.aten

_AND = {aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default}
_SAME = {
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten._to_copy.default,
    aten.clone.default,
}
_MAX_STEPS = 12


@dataclass(frozen=True)
class Joined:
    """A past input with the new tokens behind it.

    Attributes:
        past: The input.
        new: What a call adds.
        joined: Both.
        present: Place of that among the outputs.
    """

    past: fx.Node
    new: fx.Node
    joined: fx.Node
    present: int


@dataclass(frozen=True)
class KeyIndex:
    """The indexer of one layer. Nodes are given by name.

    Attributes:
        past: Input ``[B, 1, P, W]``.
        new: What the call adds, ``[B, 1, S, W]``.
        joined: Both, ``[B, 1, P + S, W]``.
        present: Position of that among the outputs.
        query: ``[B, S, heads, W]``.
        gate: ``[B, S, 1, heads]``.
        scale: Factor of the products, before what is below 0 is cut off.
        most: Keys that a query sees at most.
        mask: What the attention's mask is without it.
        width: W.
    """

    past: str
    new: str
    joined: str
    present: int
    query: str
    gate: str
    scale: float
    most: int
    mask: str
    width: int


def find_key_index(mask: fx.Node, caches: Mapping[fx.Node, Joined]) -> KeyIndex | None:
    """Return the indexer in a layer's mask; None where there is none that has this form.

    That the mask is nothing else is for :mod:`tokcc.analysis.cache_masks` to try out.

    Args:
        mask: It.
        caches: All pasts that grow, by what they become.
    """
    if mask.target not in _AND:
        return None
    for chosen, base in (mask.args[:2], mask.args[1::-1]):
        if not isinstance(chosen, fx.Node) or not isinstance(base, fx.Node):
            continue
        best = _choice(chosen)
        if best is not None and best not in made_of([base]):
            return _of_choice(best, base, caches)
    return None


def _choice(mask: fx.Node) -> fx.Node | None:
    """Return the nearest choice of the best that a mask is made of."""
    front, seen = [mask], {mask}
    for _ in range(_MAX_STEPS):
        for node in front:
            if node.target is aten.topk.default:
                return node
        front = list(dict.fromkeys(a for node in front for a in node.all_input_nodes if a not in seen))
        seen |= set(front)
    return None


def _of_choice(best: fx.Node, base: fx.Node, caches: Mapping[fx.Node, Joined]) -> KeyIndex | None:
    rated = _back(best.args[0], {aten.masked_fill.Scalar, aten.add.Tensor, *_SAME})
    if rated is None or rated.target is not aten.matmul.default:
        return None
    gate, cut = rated.args
    cut = _back(cut, _SAME)
    if not isinstance(gate, fx.Node) or cut is None or cut.target is not aten.relu.default:
        return None
    products, scale = _back(cut.args[0], _SAME), 1.0
    if products is not None and products.target is aten.mul.Tensor and isinstance(products.args[1], int | float):
        scale, products = float(products.args[1]), _back(products.args[0], _SAME)
    if products is None or products.target is not aten.matmul.default or scale <= 0:
        return None
    query, keys = products.args
    joined = caches.get(_back(keys, _SAME))  # type: ignore[arg-type]
    most = _number(best.args[1])
    if not isinstance(query, fx.Node) or joined is None or most is None:
        return None
    shapes = [node.meta["val"].shape for node in (query, gate, joined.joined)]
    if [len(shape) for shape in shapes] != [4, 4, 4] or shapes[2][1] != 1 or shapes[1][2] != 1:
        return None
    return KeyIndex(
        joined.past.name,
        joined.new.name,
        joined.joined.name,
        joined.present,
        query.name,
        gate.name,
        scale,
        most,
        base.name,
        int(shapes[2][3]),
    )


def _back(node: Any, through: set[Any]) -> fx.Node | None:
    """Go back along first operands through some operations."""
    for _ in range(_MAX_STEPS):
        if not isinstance(node, fx.Node) or node.target not in through:
            break
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _number(count: Any) -> int | None:
    """Return the number in ``number`` or ``min(number, keys)``."""
    if isinstance(count, fx.Node):
        numbers = [number for number in count.args if isinstance(number, int)]
        return numbers[0] if numbers else None
    return int(count)
