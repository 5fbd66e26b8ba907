"""All lowerings, by operation."""

from __future__ import annotations

import functools
from typing import Any

from tokcc.lowering.onnx import (
    algebra,
    block_maxima,
    block_sparse_attention,
    branches,
    cache,
    cached_attention,
    elementwise,
    indexing,
    recurrence,
    reductions,
    sampling,
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
    modules = (
        sizes,
        shapes,
        elementwise,
        reductions,
        indexing,
        algebra,
        tokens,
        subset,
        cache,
        cached_attention,
        block_maxima,
        block_sparse_attention,
        branches,
        recurrence,
        sampling,
    )
    for module in modules:
        table.update(module.LOWERINGS)
    return table
