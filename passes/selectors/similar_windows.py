"""Windows of a grid whose tokens are alike."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Cut, Matched
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.grid import grid_of, windows
from tokcc.passes.ordering import topk
from tokcc.passes.piece import Selector

__all__ = ["SimilarWindows"]


class SimilarWindows(Selector):
    """The tokens of the most uniform windows join, those of each window into one (MustDrop, arXiv:2411.10803).

    A window is rated by the mean cosine of two different tokens in it. The budget says how many tokens go: as many
    windows merge as it takes to remove that many, rounded down. The published threshold on the rating lets the input
    decide how many. The output is ``[protected | merged windows | the other tokens in order]``.

    Attributes:
        side: Rows and columns of a window.
        grid_rows: Rows of the grid; None = it is square.
        of: Vectors that similarity is measured on: their mean over heads.
    """

    kind: ClassVar[str] = "similar_windows"
    wants_score: ClassVar[bool] = False

    side: int = Field(default=3, ge=2)
    grid_rows: int | None = Field(default=None, ge=1)
    of: FeatureKind = "features"

    def select(self, cut: Cut, score: Any) -> Matched:
        """See :class:`SimilarWindows`."""
        del score
        b, side, first = cut.b, self.side, cut.first
        if cut.last:
            cut.ctx.fail("windows cannot protect tokens at the end", help="leave out `protect.last`")
        height, width = grid = grid_of(cut, self.grid_rows)
        if height % side or width % side:
            cut.ctx.fail(
                f"a grid of {height} x {width} tokens does not divide into windows of {side} x {side}",
                help="set the parameter `side`",
            )
        into, each, size = (height // side, width // side), side * side, height * width
        count = into[0] * into[1]
        merged = min((size - cut.count.kept(b, size, cut.initial_candidates)) // (each - 1), count)
        if not merged:
            return Matched(cut.positions(), None, None, first, cut.tokens)
        total = windows(cut, cut.inner(features(cut, self.of, "mean")), grid, into)  # [B, W, s^2, D]
        total = b.sum(total, 2)
        # The squared length of the sum is the sum of all cosines, of which each token's with itself is one.
        alike = b.sum(b.mul(total, total), 2)  # [B, W]
        chosen = topk(b, alike, merged, in_order=True)  # [B, Wm]
        places = torch.arange(size).reshape(into[0], side, into[1], side).permute(0, 2, 1, 3).reshape(count, each)
        entry = b.add(b.mul(b.unsqueeze(chosen, 2), each), b.arange(each, cut.x))
        members = b.look_up(b.constant("window_members", places.flatten()), entry)  # [B, Wm, s^2]
        own = torch.empty(size, dtype=torch.int64)
        own[places.flatten()] = torch.arange(count).repeat_interleave(each)
        flags = b.scatter(
            b.full([cut.batch.size, count], 1, torch.int32, cut.x),
            1,
            chosen,
            b.full([cut.batch.size, merged], 0, torch.int32, cut.x),
        )
        alone = b.call(torch.ops.aten.index_select.default, flags, 1, b.constant("window_of", own))  # [B, M]
        others = topk(b, alone, size - merged * each, in_order=True)
        keep = b.cat([b.squeeze(b.slice(members, 2, 0, 1), 2), others], 1)
        gone = merged * (each - 1)
        source = b.reshape(b.slice(members, 2, 1), [cut.batch.size, gone])
        slot = torch.arange(merged).repeat_interleave(each - 1)
        return Matched(
            keep=cut.with_protected(keep),
            source=b.add(source, first) if first else source,
            slot=cut.per_sample(b.constant("window_slot", slot)),
            first=first,
            size=size - gone + first,
        )
