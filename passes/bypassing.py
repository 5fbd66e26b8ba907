"""Layers that run for some tokens only, with all of them as keys and values.

In such a layer every value that keys and values are made of is of all tokens. Where another computation reads one of
these, or the stream itself, it gets the chosen tokens of it; the axis rules carry them to the end of the layer, where
they are put back among the others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.analysis.sites import Layer, Sites
from tokcc.analysis.walk import Walk
from tokcc.errors import PlanError
from tokcc.ir.program import Program
from tokcc.ir.reach import made_of
from tokcc.ir.space import Factor, TokenSpace
from tokcc.ir.value import Value
from tokcc.passes.reduction import PlannedReduction

__all__ = ["Bypassed", "bypassed_layers", "narrowing", "refuse_cuts_inside"]

aten = torch.ops.aten
_PARTS = {operator.getitem, aten.select.int, aten.slice.Tensor, aten.unbind.int, aten.split_with_sizes.default}


@dataclass(frozen=True)
class Bypassed:
    """One such layer; an action at its end.

    Attributes:
        layer: 0-based.
        start: The stream in front of it.
        whole: What is of all tokens in it.
        inside: Everything in it that is not.
        shared: Keys and values, which are read as they are.
    """

    layer: int
    start: fx.Node
    whole: frozenset[fx.Node]
    inside: frozenset[fx.Node]
    shared: frozenset[fx.Node]

    def space(self, walk: Walk) -> TokenSpace | None:
        """Return the chosen tokens, or None where all are."""
        found: TokenSpace | None = walk.notes.get(("bypass", self.layer))
        return found

    def narrowed(self, walk: Walk, operand: fx.Node, value: Value) -> Value:
        """Return the chosen tokens of what something in the layer reads."""
        space = self.space(walk)
        if space is None or operand in self.shared or (operand is not self.start and operand not in self.whole):
            return value
        for axis, factors in enumerate(value.axes):
            for position, factor in enumerate(factors):
                if factor.space is space.parent:
                    value = walk.ctx.remap(value, axis, position, space, None)
        return value

    def apply(self, walk: Walk, node: fx.Node, value: Value) -> Value:
        """Put the chosen tokens back among the others."""
        del node
        space = self.space(walk)
        if space is None:
            return value
        axis = value.axis_of(space)
        if axis is None or value.rank != 3 or value.batch_axis() is None:
            walk.ctx.fail(f"the output of layer {self.layer} is not of the tokens that went through it")
        assert space.parent is not None
        with walk.builder.inserting(f"bypass@{self.layer}"):
            b = walk.builder
            before: Any = walk.env[self.start].handle
            made = value.handle
            if axis == 0:
                before, made = b.transpose(before, 0, 1), b.transpose(made, 0, 1)
            index = walk.ctx.own_index(space)
            if len(b.shape(index)) == 1:
                index = b.expand(b.unsqueeze(index, 0), [b.size(made, 0), -1])
            if space.valid is not None:
                # Empty slots must not overwrite what stands where they point.
                own = b.call(torch.ops.tokcc.gather_tokens.default, before, index, 1, 0)
                made = b.where(b.unsqueeze(space.valid, 2), made, own)
            full = b.call(torch.ops.tokcc.scatter_tokens.default, before, index, made)
            axes = list(value.axes)
            axes[axis] = (Factor(space.parent, space.root.old),)
            return value.having(handle=b.transpose(full, 0, 1) if axis == 0 else full, axes=tuple(axes))


def bypassed_layers(program: Program, sites: Sites, reductions: Sequence[PlannedReduction]) -> dict[str, Bypassed]:
    """Return the layers that some tokens pass by, by the name of the node at their end."""
    nodes = {node.name: node for node in program.graph.nodes}
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    found: dict[str, Bypassed] = {}
    for reduction in reductions:
        if not reduction.reduce.bypasses:
            continue
        layer = sites.layers[reduction.layer]
        assert layer.block_output is not None
        start, end = nodes[reduction.cut], nodes[layer.block_output]
        within = {node for node, place in order.items() if order[start] < place <= order[end]}
        shared = frozenset(nodes[name] for name in _read_whole(layer))
        outside = order.keys() - within
        whole = _parts_of(within, made_of(shared, outside.__contains__))
        found[end.name] = Bypassed(reduction.layer, start, whole, frozenset(within - whole), shared)
    return found


def narrowing(layers: dict[str, Bypassed]) -> Callable[[Walk, fx.Node, fx.Node, Value], Value] | None:
    """Return what gives nodes the chosen tokens of what they read; None where no layer is passed by."""
    if not layers:
        return None
    by_node = {node: layer for layer in layers.values() for node in layer.inside}

    def on_operand(walk: Walk, node: fx.Node, operand: fx.Node, value: Value) -> Value:
        layer = by_node.get(node)
        return value if layer is None else layer.narrowed(walk, operand, value)

    return on_operand


def refuse_cuts_inside(sites: Sites, reductions: Sequence[PlannedReduction]) -> None:
    """Check that one step alone chooses the tokens of a layer that others pass by, and none reduces them inside it.

    Raises:
        PlanError: Another step does.
    """
    for reduction in reductions:
        if not reduction.reduce.bypasses:
            continue
        end = sites.layers[reduction.layer].block_output
        assert end is not None
        start, stop = sites.order[reduction.cut], sites.order[end]
        for other in reductions:
            if other is not reduction and other.reduce.bypasses and other.cut == reduction.cut:
                raise PlanError(
                    f"two steps choose the tokens that layer {reduction.layer} runs for",
                    policy=other.where,
                    found=f"the first is {reduction.where}",
                    help="give the steps different layers, or leave one out",
                )
            if other is not reduction and start < sites.order[other.cut] < stop:
                raise PlanError(
                    f"tokens pass layer {reduction.layer} by, and another step reduces them inside it",
                    policy=other.where,
                    found=f"the first is {reduction.where}",
                    help="give the steps different layers, or put the other one at `block_output`",
                )


def _read_whole(layer: Layer) -> tuple[str, ...]:
    """Return what all tokens take part in: keys and values."""
    site = layer.attention
    if site is not None and site.query in (site.key, site.value):
        raise PlanError(
            f"the queries of layer {layer.index} are its keys or values, so that they cannot be fewer",
            node=layer.label,
            help="choose other layers",
        )
    if site is not None:
        return site.key, site.value
    if layer.sampling is not None:
        return layer.sampling.images
    raise PlanError(
        f"layer {layer.index} has no attention whose queries could be fewer than its keys",
        needed="attention, plain or deformable",
        help="choose other layers",
    )


def _parts_of(within: set[fx.Node], whole: set[fx.Node]) -> frozenset[fx.Node]:
    """Add what takes a part of a value of all tokens, such as the queries among queries, keys and values."""
    found, front = set(whole), list(whole)
    while front:
        taking = [user for user in front.pop().users if user in within - found and user.target in _PARTS]
        found.update(taking)
        front += taking
    return frozenset(found)
