"""Attention that each token receives: column statistics of the attention matrix."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from tokcc.passes.cut import AttentionView, Cut
from tokcc.passes.depth import LayerChoice, chosen_layer, read_layer
from tokcc.passes.piece import Score

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
        received = self._received(cut, cut.attention(read_layer(self.layer, cut)))  # [B, H, N]
        total = (b.mean if self.heads == "mean" else b.sum)(received, 1)  # [B, N]
        if self.statistic == "mean":
            # The divisor is the length before any reduction, so that scores keep their scale from layer to layer.
            length = cut.space.root.size
            total = b.div(total, float(length)) if isinstance(length, int) else b.div(total, length)
        return total

    def _received(self, cut: Cut, view: AttentionView) -> Any:
        """Return what every token receives in every head, ``[B, H, N]``."""
        b = cut.b
        votes = cut.valid if self.mask_query_rows else None
        if view.probs is None:
            votes = None if votes is None else b.cast(votes, b.dtype(view.query))
            args = (view.query, view.key, view.mask, votes, view.scale, self.skip_diagonal)
            return b.call(torch.ops.tokcc.attention_columns.default, *args)
        probs = view.probs  # [B, H, N, N]
        if votes is not None:
            probs = b.mul(probs, b.unsqueeze(b.unsqueeze(b.cast(votes, b.dtype(probs)), 1), 3))
        total = b.sum(probs, 2)
        return b.sub(total, b.call(aten.diagonal.default, probs, 0, 2, 3)) if self.skip_diagonal else total
