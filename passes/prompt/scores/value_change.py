"""How far values are from the old ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cache.runs import run_of
from tokcc.passes.prompt.cut import PromptCut
from tokcc.passes.prompt.piece import PromptScore

__all__ = ["ValueChange"]

aten = torch.ops.aten


class ValueChange(PromptScore):
    """Squared difference of a token's new and old values in this layer, summed over heads (CacheBlend, Section 4.3).

    ``d_j = sum_{h, D} (V_new - V_old)^2``. Tokens without old values get 0.
    """

    kind: ClassVar[str] = "value_change"
    reads_old: ClassVar[tuple[str, ...]] = ("value",)

    def emit(self, cut: PromptCut) -> Any:
        """See :class:`ValueChange`."""
        b = cut.b
        if cut.old is None:
            cut.fail(
                "there are no old values to compare with",
                needed="`reduce: {kind: recompute}`",
                help="add it to the step, or use another score",
            )
        old = cut.old(cut.layer, "value")  # [B, Hkv, R, Dv]
        rows = b.size(old, 2)
        new = run_of(b, cut.attention(cut.layer).value, 2, 0, rows)
        change = b.sub(b.cast(new, torch.float32), b.cast(old, torch.float32))
        distance = b.sum(b.sum(b.mul(change, change), 3), 1)  # [B, R]
        # R + N of them: the first R, and zeros for the rest.
        padded = b.cat([distance, b.mul(b.cast(cut.real, torch.float32), 0.0)], 1)
        slot = cut.slots()
        known = b.compare("lt", b.sub(slot, rows), 0)
        return b.call(aten.index_select.default, padded, 1, b.where(known, slot, b.add(slot, rows)))
