"""As many columns and distances as hold a share of the mass, or the best blocks of the whole map, for each head."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.sparse.cut import FORCED, HIDDEN, SparseCut
from tokcc.passes.sparse.lines import at_blocks, last_probabilities, last_queries
from tokcc.passes.sparse.pattern import SparsePattern
from tokcc.passes.sparse.ranking import best_of, best_within
from tokcc.passes.sparse.scores.pooled import Pooled

__all__ = ["LinesOrMap"]

aten = torch.ops.aten
ops = torch.ops.tokcc


class LinesOrMap(SparsePattern):
    """Blocks of columns and of distances, or of a pooled map, by what the last queries look at (arXiv:2502.20766).

    The mean attention of a block's worth of last queries is summed by key and by distance. As many tokens as it takes
    to get above ``mass`` make a number of blocks (a whole number more than they fill); so many column blocks and block
    distances with the largest sums are read, the first block and the distance 0 among them. A row that lies in two
    blocks of keys counts distances from both.

    Where the softmax over the products of the mean last query and the blocks' mean keys tells the block sums of the
    columns well (the root of the Jensen-Shannon divergence is below ``divergence``), a head reads by the pooled map
    instead: its largest entries over all rows, as many as hold no more than ``mass`` of it, beside the least numbers of
    columns and distances.

    Attributes:
        mass: The share.
        divergence: Below it a head reads by the map; 0 = never.
        least: Tokens in columns, and in distances, that are read in any case.
        most: Tokens in columns, and in distances, that are read at most.
    """

    kind: ClassVar[str] = "lines_or_map"

    mass: float = Field(default=0.9, gt=0, le=1)
    divergence: float = Field(default=0.1, ge=0)
    least: int = Field(default=1024, ge=1)
    most: int | None = Field(default=None, ge=1)

    def table(self, cut: SparseCut) -> Any:
        """See :class:`SparsePattern`."""
        b = cut.b
        probs, many = last_probabilities(cut, cut.block_q)
        columns = cut.shared(b.div(b.sum(probs, 2), many), self.share)  # [B, Hs, L]
        distances = cut.shared(b.div(b.call(ops.diagonal_sums.default, probs), many), self.share)
        mass = b.sum(cut.by_key(columns, 2), 3)  # [B, Hs, M]
        aware = self._aware(cut, mass, many) if self.divergence else None
        first = b.unsqueeze(b.compare("eq", cut.rank, 0), 1)
        filled = b.unsqueeze(b.compare("gt", cut.counts, 0), 1)
        rating = b.where(first, FORCED, b.where(filled, mass, HIDDEN))
        chosen = best_of(cut, rating, cut.blocks, self._wanted(cut, columns, aware))
        far = b.sum(cut.by_key(distances, 2), 3)
        far = b.where(b.compare("lt", b.arange(cut.blocks, cut.key), 1), FORCED, far)
        read = b.logical_or(b.unsqueeze(chosen, 2), self._at_distance(cut, far, self._wanted(cut, distances, aware)))
        if aware is None:
            return read
        return b.logical_or(read, b.logical_and(b.unsqueeze(aware, 3), self._mapped(cut)))

    def _wanted(self, cut: SparseCut, mass: Any, aware: Any) -> Any:
        """Return how many blocks hold the share of ``[B, Hs, L]``, int64 ``[B, Hs, 1]``."""
        b = cut.b
        least = -(-self.least // cut.block_k)
        if self.mass < 1:
            _, within = best_within(cut, mass, self.mass)
            wanted = b.add(b.call(aten.div.Tensor_mode, b.add(within, 1), cut.block_k, rounding_mode="floor"), 1)
        else:
            wanted = b.full([b.size(mass, 0), b.size(mass, 1), 1], 2**31, torch.int64, mass)
        if self.most is not None:
            wanted = b.call(aten.clamp_max.default, wanted, -(-self.most // cut.block_k))
        wanted = b.call(aten.clamp_min.default, wanted, least)
        return wanted if aware is None else b.where(aware, least, wanted)

    def _at_distance(self, cut: SparseCut, rating: Any, wanted: Any) -> Any:
        """Return the blocks at the best distances, counted in blocks ``[B, Hs, M]``: bool ``[B, Hs, MQ, M]``."""
        b = cut.b
        best = b.cast(best_of(cut, rating, cut.blocks, wanted), torch.int64)
        number = b.arange(cut.blocks, cut.key)
        found = None
        for slots in (cut.first_slots, cut.last_slots):
            own = b.call(aten.div.Tensor_mode, slots, cut.block_k, rounding_mode="floor")
            away = b.sub(b.unsqueeze(own, 1), b.unsqueeze(number, 0))  # [MQ, M]
            read = b.compare("gt", at_blocks(cut, best, b.call(aten.clamp_min.default, away, 0)), 0)
            read = b.logical_and(read, b.compare("ge", away, 0))
            found = read if found is None else b.logical_or(found, read)
        return found

    def _aware(self, cut: SparseCut, mass: Any, many: Any) -> Any:
        """Return which heads the pooled products tell enough about, bool ``[B, Hs, 1]``."""
        b = cut.b
        query, real = last_queries(cut, cut.block_q)
        kept = b.mul(query, b.cast(b.unsqueeze(b.unsqueeze(real, 1), 3), b.dtype(query)))
        mean = b.div(b.sum(kept, 2, keepdim=True), b.cast(b.unsqueeze(many, 3), b.dtype(query)))  # [B, H, 1, D]
        logits = b.mul(cut.products(mean, cut.key_means), cut.scale)
        filled = b.unsqueeze(b.unsqueeze(b.compare("gt", cut.counts, 0), 1), 1)
        guess = b.squeeze(b.softmax(b.where(filled, logits, -1e30), 3), 2)
        guess = cut.shared(guess, self.share)  # [B, Hs, M]
        middle = b.mul(b.add(guess, mass), 0.5)
        apart = [b.sum(b.mul(x, b.log(b.div(b.add(x, _TINY), b.add(middle, _TINY)))), 2, keepdim=True)
                 for x in (guess, mass)]  # fmt: skip
        return b.compare("lt", b.mul(b.add(*apart), 0.5), self.divergence**2)

    def _mapped(self, cut: SparseCut) -> Any:
        """Return the largest entries of the pooled map over all rows of a sample, bool ``[B, Hs, MQ, M]``."""
        b = cut.b
        asked = b.cast(b.compare("gt", cut.query_counts, 0), torch.float32)  # [B, MQ]
        chances = cut.shared(Pooled(probability=True).emit(cut), self.share)
        chances = b.mul(chances, b.unsqueeze(b.unsqueeze(asked, 1), 3))
        limit = b.unsqueeze(b.mul(b.sum(asked, 1, keepdim=True), self.mass), 1)  # [B, 1, 1]
        inside, _ = best_within(cut, b.call(aten.flatten.using_ints, chances, 2, 3), limit)
        return b.reshape(inside, [b.size(inside, 0), b.size(inside, 1), cut.rows, cut.blocks])


_TINY = 1e-20
