"""Drop what was not selected."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.piece import Reducer

__all__ = ["Drop", "take"]


def take(cut: Cut, values: Any, index: Any) -> Any:
    """Take tokens of ``[B, N, ...]`` by ``[B, K]`` or ``[K]``."""
    b = cut.b
    if len(b.shape(index)) == 1:
        return b.call(torch.ops.aten.index_select.default, values, 1, index)
    if len(b.shape(values)) == 2:
        return b.gather(values, 1, index)
    return b.call(torch.ops.tokcc.gather_tokens.default, values, index, 1, 0)


class Drop(Reducer):
    """The selected tokens stay as they are; the others are gone."""

    kind: ClassVar[str] = "drop"
    takes: ClassVar[tuple[type, ...]] = (Kept,)

    def reduce(self, cut: Cut, chosen: Kept, child: TokenSpace) -> Any:
        """See :class:`Drop`."""
        child.size, child.index, child.valid = chosen.size, chosen.index, chosen.valid
        child.ascending = chosen.ascending
        child.base = cut.x
        if cut.space.weight is not None:
            child.weight, child.bias = take(cut, cut.space.weight, chosen.index), cut.space.bias
        return take(cut, cut.x, chosen.index)
