"""Some of what goes takes the others in."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from tokcc.passes.features import normalised
from tokcc.passes.prompt.cut import PromptCut, Remaining, Selected
from tokcc.passes.prompt.piece import PromptReducer
from tokcc.passes.prompt.placing import behind_candidates

__all__ = ["Contextual"]


class Contextual(PromptReducer):
    """Evenly spaced pruned tokens, each with the mean of those that join it (VisionDrop, arXiv:2506.22283).

    A pruned token joins the one whose key of the next layer, mean over heads, has the largest cosine with its own.

    Attributes:
        tokens: How many of them stay.
    """

    kind: ClassVar[str] = "contextual"

    tokens: int = Field(default=4, ge=1)

    def added(self, pruned: int) -> int:
        """See :class:`PromptReducer`."""
        return min(self.tokens, pruned)

    def reduce(self, cut: PromptCut, chosen: Selected) -> Remaining:
        """See :class:`Contextual`."""
        b = cut.b
        assert cut.present is not None
        assert cut.remaining is not None
        pruned = cut.present - cut.remaining
        targets = self.added(pruned)
        some, few = (b.max_sizes(b.mul_sizes(cut.first_call, n), 1) for n in (pruned, targets))
        flags = b.cast(cut.pruned(chosen), torch.float32)
        rest = b.call(torch.ops.tokcc.topk_select.default, flags, some, True)  # [B, R]
        key = normalised(b, b.cast(b.mean(cut.probe(None).key, 1), torch.float32))  # [B, N, D]
        own = cut.rows_of(key, rest)
        first = b.mul(b.arange(few, own), max(1, pruned // targets))  # [Q]
        target = b.call(torch.ops.aten.index_select.default, own, 1, first)
        nearest = b.argmax(b.matmul(own, b.transpose(target, 1, 2)), 2, keepdim=True)  # [B, R, 1]
        joins = b.compare("eq", nearest, b.arange(few, own))  # [B, R, Q]
        stays = b.compare("eq", b.unsqueeze(b.arange(some, own), 1), first)  # [R, Q]
        others = b.compare("eq", b.sum(b.cast(stays, torch.int64), 1, keepdim=True), 0)  # [R, 1]
        member = b.cast(b.logical_and(joins, others), torch.float32)
        x = b.cast(cut.rows_of(cut.x, rest), torch.float32)
        total = b.matmul(b.transpose(member, 1, 2), x)  # [B, Q, C]
        count = b.unsqueeze(b.clamp_min(b.sum(member, 1), 1.0), 2)
        made = b.add(b.call(torch.ops.aten.index_select.default, x, 1, first), b.div(total, count))
        stands_for = b.call(torch.ops.aten.index_select.default, rest, 1, first)
        new = b.cast(made, b.dtype(cut.x))
        return behind_candidates(cut, chosen, new, stands_for, b.mul_sizes(cut.first_call, targets))
