"""Symbolic sizes as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

__all__ = ["known_number", "number"]


def number(size: Any, bindings: Mapping[Any, int]) -> int:
    """Return a size (int or ``SymInt``) with symbols replaced."""
    if isinstance(size, int):
        return size
    return _value(size.node.expr, bindings)


def known_number(size: Any, bindings: Mapping[Any, int]) -> int | None:
    """Return a size with symbols replaced; None where one of them is not known.

    A size that torch found equal to another one has that one's symbol now, perhaps of another program of the same
    trace; its own is known then.
    """
    if isinstance(size, int):
        return size
    for expression in (size.node.expr, size.node._expr):
        if expression.free_symbols <= bindings.keys():
            return _value(expression, bindings)
    return None


def _value(expression: Any, bindings: Mapping[Any, int]) -> int:
    return int(expression.xreplace({key: sympy.Integer(value) for key, value in bindings.items()}))
