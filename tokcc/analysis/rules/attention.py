"""Scaled dot-product attention, kept whole."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.analysis.context import Context, Group
from tokcc.ir.space import TokenSpace
from tokcc.ir.value import Value

__all__ = ["RULES", "key_bias", "masking_value"]

aten = torch.ops.aten


def masking_value(dtype: torch.dtype) -> float:
    """Return the additive mask of a forbidden key: finite, so that a row that may attend to nothing stays finite."""
    return float(torch.finfo(dtype).min)


def key_bias(ctx: Context, space: TokenSpace, dtype: torch.dtype) -> Any:
    """Return the additive bias ``[B, K]`` that attention over a reduced space needs, or None.

    ``log(size)`` makes a merged token count as often as it stands for tokens (ToMe, arXiv:2210.09461, eq. 1); slots
    without a real token are masked.
    """
    b = ctx.builder
    bias: Any = None
    if space.bias and space.weight is not None:
        weight = b.cast(space.weight, torch.float32)
        if space.valid is not None:
            # Padding weighs 0: its log must be finite, it is masked below.
            weight = b.clamp_min(weight, 1e-30)
        bias = b.cast(b.log(weight), dtype)
    if space.valid is not None:
        bias = b.where(space.valid, 0.0 if bias is None else bias, masking_value(dtype))
        bias = b.cast(bias, dtype)
    return bias


def attention(
    ctx: Context,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Value:
    """SDPA: query and key axes carry separate spaces, the mask follows both, merged keys get their size bias."""
    rank = query.rank
    lead = rank - 2
    operands = [query, key, value]
    if mask is not None:
        if not ctx.clean:
            mask = ctx.pad_rank(mask, rank)
        operands.append(mask)
    groups: list[Group] = []
    for p in range(-rank, -2):
        groups.append([(i, v.rank + p) for i, v in enumerate(operands) if v.rank + p >= 0])
    keys: Group = [(1, rank - 2), (2, rank - 2)]
    queries: Group = [(0, rank - 2)]
    if mask is not None:
        keys.append((3, mask.rank - 1))
        if mask.rank >= 2:
            queries.append((3, mask.rank - 2))
    groups += [keys, queries]
    aligned, joints = ctx.align(operands, groups)
    old = ctx.old_shape()
    axes = (*joints[:lead], aligned[0].axes[-2], aligned[2].axes[-1])
    if ctx.clean:
        return Value(ctx.emit(), axes, old)
    q, k, v = aligned[:3]
    bias = aligned[3].handle if mask is not None else None
    key_axis = k.axes[-2]
    space = key_axis[0].space if len(key_axis) == 1 else None
    b = ctx.builder
    if space is not None and space.reduced:
        extra = key_bias(ctx, space, b.dtype(q.handle))
        if extra is not None:
            extra = ctx.per_token(extra, (*joints[:lead], (), key_axis), rank - 1)
            bias = _join_masks(ctx, bias, extra)
    if is_causal:
        _check_causal(ctx, q, k)
        if bias is not None:
            ctx.fail("causal attention over merged or padded tokens needs an explicit mask")
    handle = b.call(
        aten.scaled_dot_product_attention.default, q.handle, k.handle, v.handle, bias, dropout, is_causal, **kwargs
    )
    return Value(handle, axes, old)


def _join_masks(ctx: Context, mask: Any, extra: Any) -> Any:
    """Add a bias per key to a mask that may be absent, boolean or additive."""
    b = ctx.builder
    if mask is None:
        return extra
    if b.dtype(mask) == torch.bool:
        return b.where(mask, extra, masking_value(b.dtype(extra)))
    return b.add(b.cast(mask, b.dtype(extra)), extra)


def _check_causal(ctx: Context, query: Value, key: Value) -> None:
    if query.axes[-2] != key.axes[-2]:
        ctx.fail("causal attention between different token sets")
    if not all(s.ascending for s in query.spaces):
        ctx.fail("causal attention over tokens that were reordered")


RULES: dict[Any, Any] = {aten.scaled_dot_product_attention.default: attention}
