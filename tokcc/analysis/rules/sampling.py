"""Sampling an image at places, as deformable attention does."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.analysis.context import Context
from tokcc.ir.value import Value

__all__ = ["RULES"]

aten = torch.ops.aten


def grid_sampler(ctx: Context, image: Value, grid: Value, *how: Any) -> Value:
    """Sample ``[G, C, h, w]`` at the places ``[G, H, W, 2]``: the result ``[G, C, H, W]`` has the places' axes."""
    if image.reduced:
        ctx.fail("an image is made of fewer tokens than it has pixels")
    ((image, grid), joints) = ctx.align([image, grid], [[(0, 0), (1, 0)]])
    handle = ctx.emit(image.handle, grid.handle, *how)
    return Value(handle, (joints[0], image.axes[1], grid.axes[1], grid.axes[2]), ctx.old_shape())


RULES: dict[Any, Any] = {aten.grid_sampler.default: grid_sampler}
