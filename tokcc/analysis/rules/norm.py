"""Normalisations over feature axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokcc.analysis.context import Context
from tokcc.ir.value import Value

__all__ = ["RULES"]

aten = torch.ops.aten


def _check(ctx: Context, x: Value, axes: range) -> None:
    for axis in axes:
        if any(f.space is not None and not f.space.is_batch and f.space.reduced for f in x.axes[axis]):
            ctx.fail("a normalisation runs over the token axis")


def layer_norm(ctx: Context, x: Value, normalized_shape: Sequence[Any], *rest: Any) -> Value:
    """Layer or RMS norm over the last axes."""
    _check(ctx, x, range(x.rank - len(normalized_shape), x.rank))
    handles = [r.handle if isinstance(r, Value) else r for r in rest]
    return x.having(handle=ctx.emit(x.handle, list(normalized_shape), *handles))


def channel_norm(ctx: Context, x: Value, *rest: Any, **kwargs: Any) -> Value:
    """Batch norm in evaluation: one scale per channel (axis 1); other axes are only passed on."""
    handles = [r.handle if isinstance(r, Value) else r for r in rest]
    _check(ctx, x, range(1, 2))
    return x.having(handle=ctx.emit(x.handle, *handles, **kwargs))


def group_norm(ctx: Context, x: Value, *rest: Any, **kwargs: Any) -> Value:
    """Group norm has statistics over all axes but the batch."""
    handles = [r.handle if isinstance(r, Value) else r for r in rest]
    _check(ctx, x, range(1, x.rank))
    return x.having(handle=ctx.emit(x.handle, *handles, **kwargs))


RULES: dict[Any, Any] = {
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: layer_norm,
    aten.batch_norm.default: channel_norm,
    aten.group_norm.default: group_norm,
}
