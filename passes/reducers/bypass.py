"""Let the layer behind the cut run for the selected tokens; the others pass it by."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.ir.space import TokenSpace
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.piece import Reducer

__all__ = ["Bypass"]


class Bypass(Reducer):
    """The selected tokens are the layer's queries, and go through its MLP; all tokens are its keys and values.

    Behind the layer they take their places among the others again, which stay what they were (Focus-DETR,
    arXiv:2307.12612, section 3). For steps at the site `block_input`.
    """

    kind: ClassVar[str] = "bypass"
    takes: ClassVar[tuple[type, ...]] = (Kept,)
    bypasses: ClassVar[bool] = True

    def reduce(self, cut: Cut, chosen: Kept, child: TokenSpace) -> Any:
        """See :class:`Bypass`: which tokens they are; nothing is taken before somebody asks for it."""
        child.size, child.index, child.valid = chosen.size, chosen.index, chosen.valid
        child.ascending = chosen.ascending
        return cut.x
