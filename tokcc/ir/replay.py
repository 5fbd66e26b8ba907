"""Emitting a part of a graph again, of other values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

__all__ = ["replayed"]


def replayed(nodes: Sequence[fx.Node], call: Callable[..., Any], known: Mapping[fx.Node, Any]) -> Any:
    """Emit nodes again.

    Args:
        nodes: In order.
        call: Emits a node.
        known: Handles of what they read besides each other; a node among them is not emitted.

    Returns:
        The handle of the last one.
    """
    local = dict(known)
    for node in nodes:
        if node not in local:
            operands: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: local[n])
            args, kwargs = operands
            local[node] = call(node.target, *args, **kwargs)
    return local[nodes[-1]]
