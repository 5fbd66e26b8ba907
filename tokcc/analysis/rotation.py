"""Finding how a decoder turns queries and keys by position, so that it can be done again for other positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.ir.program import Program
from tokcc.ir.reach import made_of
from tokcc.ir.replay import replayed

__all__ = ["Rotation", "find_rotation"]

aten = torch.ops.aten

_PROJECTIONS = frozenset({aten.linear.default, aten.addmm.default, aten.mm.default, aten.embedding.default})


@dataclass(frozen=True)
class Rotation:
    """The part of a graph from an unrotated value and the positions to the rotated value.

    Attributes:
        source: The unrotated value, of the shape of the result.
        positions: The input with the positions, int ``[B, S]``.
        nodes: What lies between, in order; the last one is the result.
        outside: What it reads besides: constants.
    """

    source: fx.Node
    positions: fx.Node
    nodes: tuple[fx.Node, ...]
    outside: tuple[fx.Node, ...]

    def replay(self, call: Callable[..., Any], source: Any, positions: Any, env: dict[fx.Node, Any]) -> Any:
        """Emit the rotation again.

        Args:
            call: Emits a node.
            source: Handle of another unrotated value.
            positions: Handle of its positions.
            env: Handles of what is read besides.
        """
        known = {**{node: env[node] for node in self.outside}, self.source: source, self.positions: positions}
        return replayed(self.nodes, call, known)


def find_rotation(program: Program, result: fx.Node) -> Rotation | None:
    """Return how a value depends on the positions, or None when it does not, or not in a form that can be repeated."""
    positions = next((node for node in program.user_inputs if "position" in node.name), None)
    if positions is None:
        return None
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    hidden = _users(*(node for node in program.user_inputs if node is not positions))
    tables = _users(positions) - hidden  # cosines and sines
    given = set(program.user_inputs)
    local = sorted(made_of([result], lambda node: _projects(node, given)), key=order.__getitem__)
    turned: set[fx.Node] = set()
    for node in local:
        if any(a is positions or a in tables or a in turned for a in node.all_input_nodes):
            turned.add(node)
    if result not in turned:
        return None
    inside = set(turned)
    work = [a for node in turned for a in node.all_input_nodes]
    while work:
        node = work.pop()
        if node in tables and node not in inside:
            inside.add(node)
            work += node.all_input_nodes
    # What enters from the hidden state leads back to one value: the projection before it is turned.
    entering = {a for node in inside for a in node.all_input_nodes if a not in inside and a in hidden}
    between: set[fx.Node] = set()
    while len(entering) > 1:
        last = max(entering, key=order.__getitem__)
        entering.remove(last)
        before = [a for a in last.all_input_nodes if a in hidden]
        if not before:
            return None
        between.add(last)
        entering.update(before)
    if not entering:
        return None
    source = entering.pop()
    mine, theirs = source.meta["val"], result.meta["val"]
    if not isinstance(mine, torch.Tensor) or len(mine.shape) != len(theirs.shape):
        return None
    if any(str(a) != str(b) for a, b in zip(mine.shape, theirs.shape, strict=True)):
        return None
    nodes = sorted(inside | between, key=order.__getitem__)
    known = {source, positions, *nodes}
    outside = dict.fromkeys(a for node in nodes for a in node.all_input_nodes if a not in known)
    return Rotation(source, positions, tuple(nodes), tuple(outside))


def _users(*nodes: fx.Node) -> set[fx.Node]:
    """Return everything that depends on the nodes; sizes do not count."""
    found: set[fx.Node] = set()
    work = [user for node in nodes for user in node.users]
    while work:
        node = work.pop()
        if node not in found and isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
            found.add(node)
            work += node.users
    return found


def _projects(node: fx.Node, given: set[fx.Node]) -> bool:
    """Return True for a linear layer, a product with a constant among them."""
    if node.target is torch.ops.aten.matmul.default:
        return any(a.op == "placeholder" and a not in given for a in node.all_input_nodes)
    return node.target in _PROJECTIONS
