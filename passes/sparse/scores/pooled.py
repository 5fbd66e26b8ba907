"""Blocks by the product of their means."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.piece import SparseScore

__all__ = ["Pooled"]


class Pooled(SparseScore):
    """The product of the mean query of a row and the mean key of a block (MInference, arXiv:2407.02490).

    With ``length: root`` each mean is multiplied by the root of how many tokens it is of, so that blocks which are cut
    short count less (DHSA, arXiv:2510.24606, for chunks of one size). With ``probability`` the softmax over the blocks
    that a row sees (FlexPrefill, arXiv:2502.20766).

    Attributes:
        length: How the number of tokens enters.
        probability: Whether the rating is a probability.
    """

    kind: ClassVar[str] = "pooled"

    length: Literal["mean", "root"] = "mean"
    probability: bool = False

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        b = cut.b
        query, key = cut.query_means, cut.key_means
        if self.length == "root":
            query = b.mul(query, self._roots(cut, cut.query_counts, query))
            key = b.mul(key, self._roots(cut, cut.counts, key))
        logits = b.mul(cut.products(query, key), cut.scale)
        if not self.probability:
            return logits
        return b.softmax(b.where(cut.visible, logits, -1e30), 3)

    @staticmethod
    def _roots(cut: SparseCut, counts: Any, like: Any) -> Any:
        b = cut.b
        return b.unsqueeze(b.unsqueeze(b.cast(b.sqrt(counts), b.dtype(like)), 1), 3)
