"""The best-scored tokens, each with its neighbours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cache.cut import LOWEST
from tokcc.passes.prompt.cut import PromptCut, Selected
from tokcc.passes.prompt.piece import PromptSelector
from tokcc.passes.prompt.selectors.topk import TopK

__all__ = ["Neighbours"]


class Neighbours(PromptSelector):
    """Token after token in the order of their score, each followed by its neighbours, the nearest first.

    The first K different candidates of that sequence stay (SpecPC, arXiv:2506.08373, and its release). Tokens that are
    no candidates have neighbours, too. Of two equal scores the earlier token comes first, of two neighbours equally
    near the left one.

    A token's first place in the sequence is the least of ``rank * width + order`` over those that it is a neighbour of,
    so that nothing is searched: K of the least are the answer.

    Attributes:
        width: The token and its neighbours together; of an even one, one more to the right than to the left.
    """

    kind: ClassVar[str] = "neighbours"

    width: int = Field(default=32, ge=1)

    def select(self, cut: PromptCut, score: Any) -> Selected:
        """See :class:`Neighbours`."""
        b = cut.b
        rating = b.where(cut.real, b.cast(score, torch.float32), LOWEST)
        order = b.call(torch.ops.tokcc.topk_select.default, rating, cut.tokens, False)  # [B, N], the best first
        place = b.add(b.mul(order, 0), cut.slots())
        rank = b.cast(b.scatter(b.mul(order, 0), 1, order, place), torch.float32)
        first = b.mul(self._first_places(cut, rank), -1.0)
        return replace(TopK().select(cut, first), score=score)

    def _first_places(self, cut: PromptCut, rank: Any) -> Any:
        """Return ``min_o rank[t - o] * width + order(o)``, fp32 ``[B, N]``: whole numbers, exact up to 2 ** 24.

        Beyond the ends the last token stands again: it has the same token as a nearer neighbour, so that its number is
        never the least. For the same reason neighbours beyond the ends, which the release moves there, add nothing.
        """
        b, left = cut.b, (self.width - 1) // 2
        offsets = sorted(range(-left, self.width - left), key=lambda offset: (abs(offset), offset))
        steps = b.constant("neighbour_offsets", torch.tensor(offsets))
        source = b.sub(b.unsqueeze(cut.slots(), 1), steps)  # [N, width]
        end = b.sub_sizes(cut.tokens, 1)
        source = b.call(torch.ops.aten.clamp_min.default, source, 0)
        source = b.sub(source, b.call(torch.ops.aten.clamp_min.default, b.sub(source, end), 0))
        flat = b.reshape(source, [b.mul_sizes(cut.tokens, self.width)])
        found = b.call(torch.ops.aten.index_select.default, rank, 1, flat)
        found = b.reshape(found, [b.size(rank, 0), cut.tokens, self.width])
        turn = b.constant("neighbour_order", torch.arange(self.width, dtype=torch.float32))
        return b.amin(b.add(b.mul(found, float(self.width)), turn), 2)
