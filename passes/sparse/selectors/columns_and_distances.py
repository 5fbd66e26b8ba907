"""The columns and the distances that the last queries look at most."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.sparse.cut import FORCED, HIDDEN, SparseCut
from tokcc.passes.sparse.lines import blocks_of_columns, blocks_of_distances, last_probabilities
from tokcc.passes.sparse.pattern import SparsePattern
from tokcc.passes.sparse.ranking import best_of

__all__ = ["ColumnsAndDistances"]

ops = torch.ops.tokcc


class ColumnsAndDistances(SparsePattern):
    """All blocks that chosen columns or distances touch (MInference's vertical-slash, arXiv:2407.02490).

    The attention of the last queries is summed by key and by distance from the query. The first tokens and the shortest
    distances are chosen in any case, and count.

    Attributes:
        columns: Keys that are chosen.
        distances: Distances that are chosen.
        queries: Last queries of the call that are looked at.
        first: First tokens of a sample among the columns.
        near: Shortest distances among those chosen.
    """

    kind: ClassVar[str] = "columns_and_distances"

    columns: int = Field(default=1000, ge=0)
    distances: int = Field(default=6096, ge=0)
    queries: int = Field(default=64, ge=1)
    first: int = Field(default=30, ge=0)
    near: int = Field(default=100, ge=0)

    def table(self, cut: SparseCut) -> Any:
        """See :class:`SparsePattern`."""
        b = cut.b
        probs, _ = last_probabilities(cut, self.queries)
        column = cut.shared(b.sum(probs, 2), self.share)  # [B, Hs, L]
        beginning = b.logical_and(b.compare("lt", cut.places, self.first), cut.real)
        column = b.where(b.unsqueeze(cut.real, 1), column, HIDDEN)
        column = b.where(b.unsqueeze(beginning, 1), FORCED, column)
        distance = cut.shared(b.call(ops.diagonal_sums.default, probs), self.share)
        distance = b.where(b.compare("lt", cut.slots, self.near), FORCED, distance)
        columns, distances = (
            best_of(cut, rating, b.min_sizes(max(count, least), cut.total))
            for rating, count, least in ((column, self.columns, self.first), (distance, self.distances, self.near))
        )
        return b.logical_or(blocks_of_columns(cut, columns), blocks_of_distances(cut, distances))
