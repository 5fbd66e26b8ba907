"""Dominators of the output: the nodes that everything must pass through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import tokcc.kernels  # registers the operations
from tokcc.ir.edit import is_float
from tokcc.ir.program import Program

__all__ = ["Stream", "find_stream"]

aten = torch.ops.aten
assert tokcc.kernels is not None
_MIXING = {aten.scaled_dot_product_attention.default, aten.softmax.int, torch.ops.tokcc.recurrence.default}


@dataclass(frozen=True)
class Stream:
    """The spine of a model.

    Attributes:
        source: The node where the main input becomes floating point (the input itself, or its embedding).
        dominators: Nodes that every path from the source to the main outputs passes, in order.
        reached: All floating-point nodes that depend on the source.
        order: Position of every node in execution order.
    """

    source: fx.Node
    dominators: tuple[fx.Node, ...]
    reached: frozenset[fx.Node]
    order: dict[fx.Node, int]

    def branching(self, node: fx.Node) -> bool:
        """Return True when more than one computation reads the node: a residual-stream point."""
        users = [u for u in node.users if u.op == "output" or u in self.reached]
        return len(users) > 1

    def groups(self, wanted: Callable[[fx.Node], bool]) -> Iterator[list[fx.Node]]:
        """Yield the wanted nodes between each two neighbouring dominators that have some, in execution order."""
        group: list[fx.Node] = []
        passed = set(self.dominators)
        for node in self.order:
            if node in passed and group:
                yield group
                group = []
            if node in self.reached and wanted(node):
                group.append(node)
        if group:
            yield group


def find_stream(program: Program) -> Stream | None:
    """Find the dominators of the main outputs along floating-point edges from the main input.

    Masks, tables and sizes are not on that path: only what is computed from the main input is followed, and the mask
    operand of an attention is ignored.

    Returns:
        The stream, or None when no output depends on a floating-point path from an input.
    """
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    best: tuple[int, Stream] | None = None
    for source in _sources(program):
        reached = _reach(source)
        outputs = [v for v in program.output_values if isinstance(v, fx.Node) and v in reached]
        if not outputs:
            continue
        dominators = _dominators(source, reached, outputs, order)
        if best is None or len(reached) > best[0]:
            best = (len(reached), Stream(source, dominators, frozenset(reached), order))
    return None if best is None else best[1]


def _sources(program: Program) -> list[fx.Node]:
    inputs = program.user_inputs
    sources = [node for node in inputs if is_float(node)]
    whole: list[fx.Node] = [
        node for node in inputs if isinstance(node.meta.get("val"), torch.Tensor) and not is_float(node)
    ]
    aliases: set[fx.Node] = set(whole)
    for node in program.graph.nodes:
        if node.op != "call_function" or is_float(node):
            continue
        plain = node.target in (aten._to_copy.default, aten.reshape.default, aten.unsqueeze.default)
        if plain and node.args[0] in aliases:
            aliases.add(node)
    sources += [n for n in program.graph.nodes if n.target is aten.embedding.default and n.args[1] in aliases]
    return sources


def _edges(node: fx.Node) -> list[fx.Node]:
    """The floating-point operands of a node, the mask of an attention excepted."""
    operands = [n for n in node.all_input_nodes if is_float(n)]
    if node.target is aten.scaled_dot_product_attention.default:
        mask: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        operands = [n for n in operands if n is not mask or n in node.args[:3]]
    return operands


def _reach(source: fx.Node) -> set[fx.Node]:
    reached = {source}
    for node in source.graph.nodes:
        if node.op == "call_function" and _carries(node) and any(n in reached for n in _edges_any(node)):
            reached.add(node)
    return reached


def _carries(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in value)
    return is_float(node)


def _edges_any(node: fx.Node) -> list[fx.Node]:
    """Operands including multi-output nodes, which have no tensor of their own."""
    return [*_edges(node), *(n for n in node.all_input_nodes if isinstance(n.meta.get("val"), list | tuple))]


def _dominators(
    source: fx.Node, reached: set[fx.Node], outputs: list[fx.Node], order: dict[fx.Node, int]
) -> tuple[fx.Node, ...]:
    """Bit-set data flow in one pass: the graph is acyclic and ordered."""
    bits: dict[fx.Node, int] = {}
    attentions: dict[fx.Node, int] = {}
    for node in source.graph.nodes:
        if node not in reached:
            continue
        own = 1 << order[node]
        count = 1 if node.target in _MIXING else 0
        if node is source:
            bits[node], attentions[node] = own, 0
            continue
        before = [n for n in _edges_any(node) if n in bits]
        common = bits[before[0]]
        for other in before[1:]:
            common &= bits[other]
        bits[node] = common | own
        attentions[node] = count + max(attentions[n] for n in before)
    # A hidden state of an early layer is an output too: the spine is that of the deepest outputs.
    deepest = max(attentions[o] for o in outputs)
    common = -1
    for output in outputs:
        if attentions[output] == deepest:
            common &= bits[output]
    return tuple(node for node in source.graph.nodes if node in bits and common >> order[node] & 1)
