"""Drop, and put what trained layers made of the kept tokens in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tokcc.ir.space import TokenSpace
from tokcc.passes.context import InContext
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.piece import Reducer
from tokcc.passes.reducers.drop import Drop
from tokcc.passes.taking import take
from tokcc.passes.trained import TensorSpec

__all__ = ["Refine"]


class Refine(InContext, Reducer):
    """Kept tokens are taken behind the layers that also rate them (EchoingPixels, arXiv:2512.10324).

    With the score `in_context` of the same weights the layers are computed once. Protected tokens stay as they are.
    """

    kind: ClassVar[str] = "refine"
    takes: ClassVar[tuple[type, ...]] = (Kept,)

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`Refine`."""
        return self.context_specs(sizes)

    def reduce(self, cut: Cut, chosen: Kept, child: TokenSpace) -> Any:
        """See :class:`Refine`."""
        b = cut.b
        Drop().reduce(cut, chosen, child)
        refined = b.cast(self.refined(cut), b.dtype(cut.x))
        return take(cut, cut.with_protected_values(refined), chosen.index)
