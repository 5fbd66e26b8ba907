"""Finding a bias that a decoder adds to the logits of each key, and how many keys it leaves by it.

Models trained with Dynamic Mask Attention (Doge, arXiv:2508.02124) make a number for each key and key head from the
values of all heads, add it to the logits of every query that sees the key, and let a query see no more than the ``w``
keys with the largest one. In the graph that is a mask that is made from values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.analysis.cache_sites import CacheSite
from tokcc.ir.program import Program
from tokcc.ir.reach import made_of
from tokcc.ir.replay import replayed

__all__ = ["KeyBias", "find_key_bias", "find_key_biases"]

aten = torch.ops.aten


@dataclass(frozen=True)
class KeyBias:
    """The part of a graph from values to the bias of their keys.

    Attributes:
        values: All values of the call ``[B, Hkv, L, Dv]``.
        nodes: What lies between, in order; the last one is the bias ``[B, Hkv, L]``.
        outside: What it reads besides: constants.
        most: Keys that a query sees at most, those with the largest bias; 0 = all.
    """

    values: fx.Node
    nodes: tuple[fx.Node, ...]
    outside: tuple[fx.Node, ...]
    most: int

    def replay(
        self,
        call: Callable[..., Any],
        size: Callable[[Any, int], Any],
        values: Any,
        env: Mapping[fx.Node, Any],
    ) -> Any:
        """Emit the bias again, of other values.

        Args:
            call: Emits a node.
            size: Emits a size of a tensor.
            values: Their handle, ``[B, Hkv, N, Dv]``.
            env: Handles of what is read besides.

        Returns:
            ``[B, Hkv, N]``.
        """
        sizes = {node: size(values, axis) for node, axis in sizes_of(self.values, self.nodes).items()}
        return replayed(self.nodes, call, {**{node: env[node] for node in self.outside}, self.values: values, **sizes})


def sizes_of(values: fx.Node, nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Return the sizes that some nodes read, as axes of the values: their batch or their length."""
    shape = [str(size) for size in values.meta["val"].shape]
    read = {a for node in nodes for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.SymInt)}
    return {node: shape.index(str(node.meta["val"])) for node in read if str(node.meta["val"]) in shape}


def find_key_biases(program: Program, sites: Sequence[CacheSite]) -> dict[int, KeyBias]:
    """Return the biases by layer, where there are any."""
    found = ((site.layer, find_key_bias(program, site)) for site in sites)
    return {layer: bias for layer, bias in found if bias is not None}


def find_key_bias(program: Program, site: CacheSite) -> KeyBias | None:
    """Return the bias that a layer's mask holds beside what it hides, or None where it is a plain mask.

    That the mask is nothing else is for :mod:`tokcc.analysis.cache_masks` to try out.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    values = nodes[site.value]
    if site.mask is None:
        return None
    before = made_of([nodes[site.mask]], lambda node: node is values)
    ordered = [node for node in program.graph.nodes if node in before]
    dependent: set[fx.Node] = set()
    for node in ordered:
        if any(a is values or a in dependent for a in node.all_input_nodes):
            dependent.add(node)
    shape = [str(size) for size in values.meta["val"].shape]
    last = None
    for node in ordered:
        fake = node.meta.get("val")
        if node in dependent and isinstance(fake, torch.Tensor) and [str(s) for s in fake.shape] == shape[:3]:
            last = node
    if last is None:
        return None
    own = made_of([last], lambda node: node is values or _known(node, values))
    inside = tuple(node for node in ordered if node in own and node.op == "call_function")
    known = {values, *inside, *sizes_of(values, inside)}
    outside = tuple(dict.fromkeys(a for node in inside for a in node.all_input_nodes if a not in known))
    if any(node.op != "placeholder" or node in program.user_inputs for node in outside):
        return None
    return KeyBias(values, inside, outside, _most(ordered, dependent))


def _known(node: fx.Node, values: fx.Node) -> bool:
    """Whether a node is a size of the values."""
    shape = [str(size) for size in values.meta["val"].shape]
    return isinstance(node.meta.get("val"), torch.SymInt) and str(node.meta["val"]) in shape


def _most(nodes: Sequence[fx.Node], dependent: set[fx.Node]) -> int:
    """Return how many keys are chosen by what values say: the number in ``min(number, keys)``."""
    for node in nodes:
        if node in dependent and node.target is aten.topk.default:
            count: Any = node.args[1]
            if isinstance(count, fx.Node):
                numbers = [number for number in count.args if isinstance(number, int)]
                return numbers[0] if numbers else 0
            return int(count)
    return 0
