"""Drop, then let the kept tokens look at each other once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from tokcc.ir.space import TokenSpace
from tokcc.passes.blocks import Blocks
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.piece import Reducer
from tokcc.passes.reducers.drop import Drop
from tokcc.passes.trained import TensorSpec

__all__ = ["Reencode"]


class Reencode(Blocks, Reducer):
    """A trained self-attention layer with a GELU MLP over the kept tokens (QTSplus, arXiv:2511.11910).

    Protected tokens stay as they are and are not looked at, nor are empty slots. Tensors: ``reencode.*``, see
    :mod:`tokcc.passes.blocks`, without ``gate_proj``.
    """

    kind: ClassVar[str] = "reencode"
    takes: ClassVar[tuple[type, ...]] = (Kept,)

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`Reencode`."""
        del sizes
        return self.layer_specs("reencode", "C", gated=False)

    def reduce(self, cut: Cut, chosen: Kept, child: TokenSpace) -> Any:
        """See :class:`Reencode`."""
        b = cut.b
        x = Drop().reduce(cut, chosen, child)
        stop = None if cut.last == 0 else b.sub_sizes(chosen.size, cut.last)
        inner = b.cast(b.slice(x, 1, cut.first, stop), torch.float32)
        mask = None if chosen.valid is None else b.slice(chosen.valid, 1, cut.first, stop)
        y = b.cast(self.layer(b, inner, "reencode", mask, cut.x, gated=False), b.dtype(x))
        parts = [b.slice(x, 1, 0, cut.first)] * bool(cut.first) + [y]
        if cut.last:
            parts.append(b.slice(x, 1, stop))
        return b.cat(parts, 1)
