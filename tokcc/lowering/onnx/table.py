"""All lowerings, by operation."""

from __future__ import annotations

import functools
from typing import Any

from tokcc.lowering.onnx import (
    algebra,
    cache,
    cached_attention,
    elementwise,
    indexing,
    reductions,
    shapes,
    sizes,
    subset,
    tokens,
)

__all__ = ["lowerings"]


@functools.cache
def lowerings() -> dict[Any, Any]:
    """Return every lowering by operation."""
    table: dict[Any, Any] = {}
    for module in (sizes, shapes, elementwise, reductions, indexing, algebra, tokens, subset, cache, cached_attention):
        table.update(module.LOWERINGS)
    return table
