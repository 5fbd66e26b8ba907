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
            cut.ctx.fail("pooling over padded batches would mix padding into the last real token")
        width = chosen.width
        child.size = chosen.size
        child.index = b.mul(b.arange(chosen.size, cut.x), width)  # the first of each group
        child.assign = b.call(
            aten.clamp_max.default,
            b.call(aten.div.Tensor_mode, cut.per_sample(cut.positions()), width, rounding_mode="floor"),
            b.sub_sizes(chosen.size, 1) if isinstance(chosen.size, int) else 2**31,
        )
        whole = b.slice(cut.x, 1, 0, b.mul_sizes(chosen.size, width))
        shape = [b.size(whole, 0), chosen.size, width, b.size(whole, 2)]
        return b.mean(b.reshape(whole, shape), 2)
