"""All lowerings, by operation."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokcc.lowering.onnx import algebra, elementwise, indexing, reductions, shapes, sizes, tokens

__all__ = ["lowerings"]


@cache
def lowerings() -> dict[Any, Any]:
    """Return every lowering by operation."""
    table: dict[Any, Any] = {}
    for module in (sizes, shapes, elementwise, reductions, indexing, algebra, tokens):
        table.update(module.LOWERINGS)
    return table
