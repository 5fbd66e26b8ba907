"""As many of the best tokens as a trained head says for a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.blocks import Blocks
from tokcc.passes.budget import Count
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.ordering import keep_counted, masked
from tokcc.passes.piece import Selector
from tokcc.passes.texts import TextGuided
from tokcc.passes.trained import TensorSpec, mlp_specs

__all__ = ["CountedByText"]

aten = torch.ops.aten


class CountedByText(TextGuided, Blocks, Selector):
    """Each sample keeps a share of its own, in as many slots as the budget says (QTSplus, arXiv:2511.11910).

    ``n = ceil(rho M)``, at least 1 and at most the slots, with
    ``rho = low + (high - low) sigmoid(MLP([mean_t q_t; ln M; max r; H(r / sum r)]))`` of the text's rows q and the
    score r of the M candidates. The best n fill the slots in sequence order, empty ones come last. Tensors:
    ``budget.layers.0`` ``[hidden, D + 3]``, ``budget.layers.1`` ``[1, hidden]``.

    Attributes:
        low: The smallest share.
        high: The largest share.
        activation: Between the two layers.
    """

    kind: ClassVar[str] = "counted_by_text"

    low: float = Field(default=0.05, ge=0.0, le=1.0)
    high: float = Field(default=0.5, gt=0.0, le=1.0)

    def removes(self, count: Count) -> bool:
        """The text decides, whatever the budget."""
        del count
        return True

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`CountedByText`."""
        del sizes
        return mlp_specs("budget.layers", ["D_and_3", "hidden", 1])

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`CountedByText`."""
        b = cut.b
        if cut.valid is not None:
            cut.ctx.fail("the share is of all tokens, and some are padding", help="use a model without a padding mask")
        slots = cut.count.kept(b, cut.candidates, cut.initial_candidates)
        rating = cut.inner(b.cast(score, torch.float32))  # [B, M]
        size = b.add(b.full([cut.batch.size, 1], 0.0, torch.float32, cut.x), cut.candidates)  # [B, 1]
        text, true, count = self.read_text(cut, self.weight("budget.layers.0.weight").shape[1] - 3)
        mean = b.div(b.sum(b.where(b.unsqueeze(true, 2), text, 0.0), 1), count)  # [B, D]
        share = b.div(rating, b.clamp_min(b.sum(rating, 1, keepdim=True), 1e-8))
        entropy = b.mul(b.sum(b.mul(share, b.log(b.add(share, 1e-8))), 1, keepdim=True), -1.0)
        facts = b.cat([mean, b.log(size), b.amax(rating, 1, keepdim=True), entropy], 1)  # [B, D + 3]
        open_ = b.call(aten.sigmoid.default, self.mlp(b, facts, "budget.layers", 2, "gelu"))  # [B, 1]
        rho = b.add(b.mul(open_, self.high - self.low), self.low)
        wanted = b.squeeze(b.call(aten.ceil.default, b.mul(rho, size)), 1)
        own = b.call(aten.clamp_min.default, b.cast(wanted, torch.int64), 1)
        full = b.add(b.call(aten.zeros_like.default, own), slots)
        return keep_counted(cut, masked(cut, score), slots, b.call(aten.minimum.default, own, full), score)
