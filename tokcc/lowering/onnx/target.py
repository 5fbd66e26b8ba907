"""What the graphs of a runtime may hold, where runtimes differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ANY_RUNTIME", "Target"]


@dataclass(frozen=True)
class Target:
    """What a runtime's graphs may hold.

    Attributes:
        name: What messages call it.
        branches: The graph may go one of two ways by the shapes of a call. Without it, there is one way for all shapes
            that the engine is made for, and a program that wants two is refused.
        free_loops: The body of a loop may cut and reshape what lies outside it, to lengths that are known at run time
            only. Without it, rows are done all at once.
        lengths_by_value: A length may depend on what a tensor holds, not only on shapes.
        sizes: The size symbols at each of the shapes that the engine is made for; empty = any shape.
        forms: Lowerings that take the place of the usual ones, by operation: those with a plugin.
        domains: Of operations that the runtime has beside the standard ones.
    """

    name: str
    branches: bool = True
    free_loops: bool = True
    lengths_by_value: bool = True
    sizes: tuple[Mapping[Any, int], ...] = ()
    forms: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)
    domains: tuple[str, ...] = ()


ANY_RUNTIME = Target("onnx")
"""ONNX Runtime, and what takes the same graphs."""
