"""What a value is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

__all__ = ["made_of"]


def made_of(ends: Iterable[fx.Node], stop: Callable[[fx.Node], bool] = lambda node: False) -> set[fx.Node]:
    """Return what some nodes are computed from, and those themselves.

    Args:
        ends: The nodes.
        stop: True for nodes that are left out, with what only they are computed from.
    """
    found: set[fx.Node] = set()
    front = list(ends)
    while front:
        node = front.pop()
        if node not in found and not stop(node):
            found.add(node)
            front += node.all_input_nodes
    return found
