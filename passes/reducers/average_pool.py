"""Average groups of neighbours."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Grouped
from tokcc.passes.piece import Reducer

__all__ = ["AveragePool"]

aten = torch.ops.aten


class AveragePool(Reducer):
    """``y_i = mean(x_{si}, ..., x_{si+s-1})``: frame pooling of audio encoders (Qwen2-Audio and others)."""

    kind: ClassVar[str] = "average_pool"
    takes: ClassVar[tuple[type, ...]] = (Grouped,)

    def reduce(self, cut: Cut, chosen: Grouped, child: TokenSpace) -> Any:
        """See :class:`AveragePool`."""
        b = cut.b
        if cut.valid is not None:
            cut.ctx.fail(
                "pooling over padded batches would mix padding into the last real token",
                help="use a model without a padding mask, or another reducer",
            )
        width = chosen.width
        child.size = chosen.size
        child.index = b.mul(b.arange(chosen.size, cut.x), width)  # the first of each group
        # Frames of an incomplete last group are given the last whole one.
        last = b.mul_sizes(chosen.size, width)
        inside = b.call(aten.clamp_max.default, cut.positions(), b.sub_sizes(last, 1))
        child.assign = cut.per_sample(b.call(aten.div.Tensor_mode, inside, width, rounding_mode="floor"))
        if isinstance(last, int) and isinstance(cut.tokens, int):
            whole = b.slice(cut.x, 1, 0, last)
        else:
            # The symbolic length of a slice is a minimum, which the reshape could only match by fixing N's parity.
            whole = b.call(aten.index_select.default, cut.x, 1, b.arange(last, cut.x))
        shape = [b.size(whole, 0), chosen.size, width, b.size(whole, 2)]
        return b.mean(b.reshape(whole, shape), 2)
