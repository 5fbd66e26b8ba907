"""Symbolic sizes as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

__all__ = ["number"]


def number(size: Any, bindings: Mapping[Any, int]) -> int:
    """Return a size (int or ``SymInt``) with symbols replaced."""
    if isinstance(size, int):
        return size
    return int(size.node.expr.xreplace({key: sympy.Integer(value) for key, value in bindings.items()}))
