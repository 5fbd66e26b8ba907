"""Dominant tokens, and a matching of the others to evenly strided targets."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Cut, Matched
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.ordering import masked, topk
from tokcc.passes.piece import Selector

__all__ = ["StridedTargets"]


class StridedTargets(Selector):
    """Keep the best-scored tokens and assign the others to targets among them (VisionZip, arXiv:2412.04467).

    Of the R tokens that are not kept by score, those at 0, s, 2s, ... with ``s = max(1, R // targets)`` are targets;
    each other one joins the target of largest cosine. The output is ``[protected | best, in order | targets]``.

    Attributes:
        targets: How many tokens of the budget are targets.
        of: Vectors that similarity is measured on: their mean over heads.
    """

    kind: ClassVar[str] = "strided_targets"

    targets: int = Field(default=10, ge=1)
    of: FeatureKind = "keys"

    def select(self, cut: Cut, score: Any) -> Matched:
        """See :class:`StridedTargets`."""
        b, p, size, wanted = cut.b, cut.first, cut.candidates, self.targets
        if cut.last:
            cut.ctx.fail("strided targets cannot protect tokens at the end", help="leave out `protect.last`")
        if cut.valid is not None:
            cut.ctx.fail("strided targets of a padded batch would be padding", help="use a model without a mask")
        kept = cut.count.kept(b, size, cut.initial_candidates)
        if isinstance(kept, int) and kept < wanted:
            cut.ctx.fail(f"{kept} tokens are kept, and {wanted} of them are to be targets", help="use fewer targets")
        best = b.sub_sizes(kept, wanted)
        rest = b.sub_sizes(size, best)
        # Two stable sorts of 0 and 1: the best in sequence order, then the others in theirs.
        chosen = topk(b, cut.inner(masked(cut, score)), best, in_order=False)
        order = self._first(cut, size, chosen, best)
        best_index, others = b.slice(order, 1, 0, best), b.slice(order, 1, best)  # [B, best], [B, R]
        stride = b.max_sizes(b.floordiv_sizes(rest, wanted), 1)
        at = cut.per_sample(b.mul(b.arange(wanted, cut.x), stride))  # [B, T] places among the others
        order = self._first(cut, rest, at, wanted)
        target = b.gather(others, 1, b.slice(order, 1, 0, wanted))
        source = b.gather(others, 1, b.slice(order, 1, wanted))
        metric = cut.inner(features(cut, self.of, "mean"))  # [B, M, D]
        rows, columns = (
            b.call(torch.ops.tokcc.gather_tokens.default, metric, index, 1, 0) for index in (source, target)
        )
        slot = b.argmax(b.matmul(rows, b.transpose(columns, 1, 2)), 2)  # [B, R - T]
        return Matched(
            keep=cut.with_protected(b.cat([best_index, target], 1)),
            source=b.add(source, p) if p else source,
            slot=slot,
            first=b.add_sizes(best, p),
            size=b.add_sizes(kept, p),
        )

    @staticmethod
    def _first(cut: Cut, size: Any, index: Any, count: Any) -> Any:
        """Return all of ``0 .. size - 1``, ``[B, size]``: those in ``index`` ``[B, count]``, then the others."""
        b = cut.b
        zeros = b.full([cut.batch.size, size], 0, torch.int32, cut.x)
        flags = b.scatter(zeros, 1, index, b.full([cut.batch.size, count], 1, torch.int32, cut.x))
        return topk(b, flags, size, in_order=False)
