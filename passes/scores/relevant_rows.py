"""Attention of those tokens that receive much of it themselves."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Cut
from tokcc.passes.depth import LayerChoice, chosen_layer, read_layer
from tokcc.passes.piece import Score
from tokcc.passes.scores.attention_rows import query_rows
from tokcc.passes.subset import candidates_valid

__all__ = ["RelevantRows"]


class RelevantRows(Score):
    """The mean attention that global tokens pay (VFlowOpt, arXiv:2508.05211).

    Heads are averaged. A candidate is global when the attention that it receives from all candidates is more than
    ``above`` times the mean of all; where none is, all are.

    Attributes:
        above: Factor of the mean.
        layer: Another layer to read: from 0, from the end, or a fraction of the depth; default the cut's own.
    """

    kind: ClassVar[str] = "relevant_rows"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    full_attention: ClassVar[bool] = True

    above: float = Field(default=1.0, ge=0.0)
    layer: LayerChoice = None

    def layers(self, layer: int, num_layers: int) -> tuple[int, ...]:
        """Return the layer that is read."""
        return (chosen_layer(self.layer, layer, num_layers),)

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        probs = b.mean(query_rows(cut, cut.attention(read_layer(self.layer, cut)), 0, None), 1)
        rows = cut.inner(b.cast(probs, torch.float32))  # [B, M, N]
        valid = candidates_valid(cut)
        real = b.full([cut.batch.size, cut.candidates], 1.0, torch.float32, cut.x)
        real = real if valid is None else b.cast(valid, torch.float32)
        received = b.sum(b.mul(rows, b.unsqueeze(real, 2)), 1)
        received = b.mul(cut.inner(received), real)  # [B, M]
        total, count = b.sum(received, 1, keepdim=True), b.sum(real, 1, keepdim=True)
        # Times the count on either side: the mean of what one receives would only be divided by it once more.
        global_ = b.mul(b.cast(b.compare("gt", b.mul(received, count), b.mul(total, self.above)), torch.float32), real)
        some = b.compare("gt", b.sum(global_, 1, keepdim=True), 0.5)
        votes = b.where(some, global_, real)
        votes = b.div(votes, b.clamp_min(b.sum(votes, 1, keepdim=True), 1.0))
        return b.squeeze(b.matmul(b.unsqueeze(votes, 1), rows), 1)
