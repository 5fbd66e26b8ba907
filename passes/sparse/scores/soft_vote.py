"""Blocks by a vote of all heads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.piece import SparseScore

__all__ = ["SoftVote"]


class SoftVote(SparseScore):
    """What each head's softmax gives a block, summed over the heads (TokenSelect, arXiv:2411.02886).

    The mean query of a row meets the mean keys of blocks: of blocks of one key, the keys. The softmax of a head is over
    the blocks that compete: not the first ones, those near the row, and its own, which are read in any case.

    Attributes:
        sinks: First blocks of a sample, as the selector has them.
        local: Blocks in front of the own ones, likewise.
        scaled: Whether products have the scale of the attention; without it a head votes for few blocks.
    """

    kind: ClassVar[str] = "soft_vote"

    sinks: int = Field(default=0, ge=0)
    local: int = Field(default=0, ge=0)
    scaled: bool = False

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        b = cut.b
        logits = cut.products(cut.query_means, cut.key_means)
        if self.scaled:
            logits = b.mul(logits, cut.scale)
        competes = b.logical_and(cut.visible, b.logical_not(cut.nearest(self.local)))
        if self.sinks:
            competes = b.logical_and(competes, b.logical_not(cut.sinks(self.sinks)))
        votes = b.softmax(b.where(competes, logits, -1e30), 3)
        return b.sum(b.mul(votes, b.cast(competes, torch.float32)), 1, keepdim=True)
