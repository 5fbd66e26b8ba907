"""Clusters of the better ones among what goes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cache.cut import LOWEST
from tokcc.passes.prompt.cut import PromptCut, Remaining, Selected
from tokcc.passes.prompt.piece import PromptReducer
from tokcc.passes.prompt.placing import behind_candidates

__all__ = ["Recycle"]

aten = torch.ops.aten


class Recycle(PromptReducer):
    """The best ``int(share * p) + 1`` of p pruned tokens become means of clusters (SparseVLM, arXiv:2410.04417).

    Clusters are found by density peaks: there are ``int(t / size) + 1`` of them for t tokens, around those whose
    density ``exp(-mean of the nearest squared distances)`` times distance to a denser token is largest. Equally dense
    ones: the earlier counts as denser.

    Attributes:
        share: Of the pruned tokens.
        size: Tokens in a cluster, about.
    """

    kind: ClassVar[str] = "recycle"

    share: float = Field(default=0.3, gt=0, le=1)
    size: int = Field(default=10, ge=1)

    def _counts(self, pruned: int) -> tuple[int, int]:
        """Return how many tokens are recycled, and into how many."""
        tokens = min(int(self.share * pruned) + 1, pruned)
        return tokens, min(tokens // self.size + 1, tokens)

    def added(self, pruned: int) -> int:
        """See :class:`PromptReducer`."""
        return self._counts(pruned)[1] if pruned else 0

    def reduce(self, cut: PromptCut, chosen: Selected) -> Remaining:
        """See :class:`Recycle`."""
        b = cut.b
        assert cut.present is not None
        assert cut.remaining is not None
        tokens, clusters = self._counts(cut.present - cut.remaining)
        # One of each in other calls, where they are cut off again: there is no mean of nothing.
        some, few = (b.max_sizes(b.mul_sizes(cut.first_call, n), 1) for n in (tokens, clusters))
        rating = b.where(cut.pruned(chosen), b.cast(chosen.score, torch.float32), LOWEST)
        index = b.call(torch.ops.tokcc.topk_select.default, rating, some, True)  # [B, T]
        x = b.cast(cut.rows_of(cut.x, index), torch.float32)
        apart = self._distances(cut, x)  # [B, T, T]
        centres = self._centres(cut, apart, some, few)  # [B, Q]
        near = cut.rows_of(apart, centres)  # [B, Q, T]
        place = b.unsqueeze(b.unsqueeze(b.arange(some, x), 0), 0)
        near = b.where(b.compare("eq", b.unsqueeze(centres, 2), place), -1.0, near)
        own = b.argmax(b.mul(near, -1.0), 1, keepdim=True)  # [B, 1, T]
        rows = b.unsqueeze(b.unsqueeze(b.arange(few, x), 0), 2)
        member = b.cast(b.compare("eq", own, rows), torch.float32)  # [B, Q, T]
        means = b.div(b.matmul(member, x), b.sum(member, 2, keepdim=True))
        new = b.cast(means, b.dtype(cut.x))
        # Any of the recycled tokens will do: the first ones, as centres of nearly equal tokens are chance.
        return behind_candidates(cut, chosen, new, index, b.mul_sizes(cut.first_call, clusters))

    def _distances(self, cut: PromptCut, x: Any) -> Any:
        b = cut.b
        width = int(b.shape(x)[2])
        squares = b.sum(b.mul(x, x), 2)  # [B, T]
        both = b.add(b.unsqueeze(squares, 1), b.unsqueeze(squares, 2))
        inner = b.matmul(x, b.transpose(x, 1, 2))
        return b.sqrt(b.clamp_min(b.div(b.sub(both, b.mul(inner, 2.0)), float(width)), 0.0))

    def _centres(self, cut: PromptCut, apart: Any, some: Any, few: Any) -> Any:
        b = cut.b
        batch = b.size(apart, 0)
        flat = b.reshape(b.mul(apart, -1.0), [b.mul_sizes(batch, some), some])
        nearest = b.call(torch.ops.tokcc.topk_select.default, flat, few, False)
        close = b.reshape(b.gather(flat, 1, nearest), [batch, some, few])
        density = b.exp(b.mul(b.mean(b.mul(close, close), 2), -1.0))  # [B, T]
        place = b.arange(some, apart)
        mine, theirs = b.unsqueeze(density, 2), b.unsqueeze(density, 1)
        earlier = b.unsqueeze(b.compare("lt", b.unsqueeze(place, 0), b.unsqueeze(place, 1)), 0)
        denser = b.logical_or(
            b.compare("gt", theirs, mine), b.logical_and(b.compare("eq", theirs, mine), earlier)
        )  # [B, T, T]
        far = b.unsqueeze(b.amax(b.amax(apart, 2), 1, keepdim=True), 2)
        peak = b.amin(b.where(denser, apart, far), 2)
        return b.call(torch.ops.tokcc.topk_select.default, b.mul(density, peak), few, False)
