"""Looking at a cut as if some of its tokens were gone already."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokcc.passes.cut import AttentionView, Cut
from tokcc.passes.scores.attention_rows import query_rows

__all__ = ["among"]


def among(cut: Cut, stays: Any) -> Cut:
    """Return the cut with attention only among some tokens, its rows summing to one again.

    Args:
        cut: The cut.
        stays: bool ``[B, N]``: the tokens that are there.
    """
    b = cut.b

    def attention(layer: int | None = None) -> AttentionView:
        view = cut.attention(layer)
        probs = query_rows(cut, view, 0, None)  # [B, H, N, N]
        left = b.mul(probs, b.unsqueeze(b.unsqueeze(b.cast(stays, b.dtype(probs)), 1), 1))
        return replace(view, probs=b.div(left, b.clamp_min(b.sum(left, 3, keepdim=True), 1e-7)))

    return replace(cut, space=replace(cut.space, valid=stays), attention=attention)
