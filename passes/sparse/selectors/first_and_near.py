"""The first tokens of a sample and those shortly before a query."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.lines import blocks_of_columns
from tokcc.passes.sparse.pattern import SparsePattern

__all__ = ["FirstAndNear"]


class FirstAndNear(SparsePattern):
    """All blocks that hold one of the first tokens, or one near a query of the row (A-shape of MInference).

    Attributes:
        first: First tokens of a sample.
        near: Tokens up to a query, itself among them.
    """

    kind: ClassVar[str] = "first_and_near"

    first: int = Field(default=100, ge=0)
    near: int = Field(default=800, ge=1)

    def table(self, cut: SparseCut) -> Any:
        """See :class:`SparsePattern`."""
        b = cut.b
        first = blocks_of_columns(cut, b.unsqueeze(b.logical_and(b.compare("lt", cut.places, self.first), cut.real), 1))
        start = b.sub(b.unsqueeze(cut.first_slots, 1), self.near)  # the last slot that is not near
        near = b.compare("gt", b.add(cut.block_starts, cut.block_k - 1), start)  # [MQ, M]
        return b.logical_or(first, near)
