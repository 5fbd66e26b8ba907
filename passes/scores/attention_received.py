"""Attention that each token receives: column statistics of the attention matrix."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from tokcc.passes.cut import Cut
from tokcc.passes.depth import LayerChoice, chosen_layer, read_layer
from tokcc.passes.piece import Score
from tokcc.passes.scores.attention_rows import query_rows

__all__ = ["AttentionReceived"]

aten = torch.ops.aten


class AttentionReceived(Score):
    """Column sums or means of the probabilities (PoWER-BERT, arXiv:2001.08950; LTP, arXiv:2107.00910; SpAtten).

    Attributes:
        statistic: ``mean`` over query rows, or ``sum``.
        heads: How heads are combined.
        skip_diagonal: Leave out what a token pays to itself (PoWER-BERT).
        mask_query_rows: Padding does not vote.
        layer: Another layer to read: from 0, from the end, or a fraction of the depth; default the cut's own.
    """

    kind: ClassVar[str] = "attention_received"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    full_attention: ClassVar[bool] = True

    statistic: Literal["mean", "sum"] = "mean"
    heads: Literal["mean", "sum"] = "mean"
    skip_diagonal: bool = False
    mask_query_rows: bool = True
    layer: LayerChoice = None

    def layers(self, layer: int, num_layers: int) -> tuple[int, ...]:
        """Return the layer that is read."""
        return (chosen_layer(self.layer, layer, num_layers),)

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        probs = query_rows(cut, cut.attention(read_layer(self.layer, cut)), 0, None)  # [B, H, N, N]
        over_heads = (b.mean if self.heads == "mean" else b.sum)(probs, 1)  # [B, N, N]
        if self.mask_query_rows and cut.valid is not None:
            votes = b.unsqueeze(b.cast(cut.valid, b.dtype(over_heads)), 2)
            over_heads = b.mul(over_heads, votes)
        total = b.sum(over_heads, 1)  # [B, N]
        if self.skip_diagonal:
            total = b.sub(total, b.call(aten.diagonal.default, over_heads, 0, 1, 2))
        if self.statistic == "mean":
            # The divisor is the length before any reduction, so that scores keep their scale from layer to layer.
            length = cut.space.root.size
            total = b.div(total, float(length)) if isinstance(length, int) else b.div(total, length)
        return total
