"""The best-scored tokens, each mixed with the tokens like it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Assigned, Cut
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.ordering import LOWEST, keep_indices, masked
from tokcc.passes.piece import Selector
from tokcc.passes.taking import take

__all__ = ["NearestMix"]

aten = torch.ops.aten


class NearestMix(Selector):
    """Many-to-many assignment around the K best tokens: ``W = softmax(cos(x_K, x) / temperature)`` over all candidates.

    Token Transforming (arXiv:2506.05709) writes every reduction as ``x' = W x``: with a low temperature each output is
    the token itself (pruning), with a high one a mean. A token that stands for several counts as several.

    Attributes:
        of: Vectors that similarity is measured on.
        temperature: See above.
        neighbours: How many candidates each output is made of; all of them by default.
    """

    kind: ClassVar[str] = "nearest_mix"

    of: FeatureKind = "features"
    temperature: float = Field(default=0.1, gt=0.0)
    neighbours: int | None = Field(default=None, ge=1)

    def select(self, cut: Cut, score: Any) -> Assigned:
        """See :class:`NearestMix`."""
        b = cut.b
        kept = cut.count.kept(b, cut.candidates, cut.initial_candidates)
        best = keep_indices(cut, masked(cut, score), kept)
        stop = b.sub_sizes(best.size, cut.last) if cut.last else None
        index = b.slice(best.index, 1, cut.first, stop)  # [B, K]
        x = features(cut, self.of, "concat")  # [B, N, D]
        logits = b.matmul(take(cut, x, index), b.transpose(cut.inner(x), 1, 2))  # [B, K, M]
        if self.neighbours is not None:
            logits = self._nearest(cut, logits)
        logits = b.div(logits, self.temperature)
        if cut.space.weight is not None:
            sizes = b.cast(cut.inner(cut.space.weight), torch.float32)
            logits = b.add(logits, b.unsqueeze(b.log(b.clamp_min(sizes, 1e-30)), 1))
        if cut.valid is not None:
            logits = b.where(b.unsqueeze(cut.inner(cut.valid), 1), logits, LOWEST)
        index = b.sub(index, cut.first) if cut.first else index
        valid = None if best.valid is None else b.slice(best.valid, 1, cut.first, stop)
        return Assigned(self._unless_whole(cut, b.softmax(logits, 2), index, valid), index, best.size, valid, True)

    def _unless_whole(self, cut: Cut, matrix: Any, index: Any, valid: Any) -> Any:
        """Leave the samples alone that keep every token, as a program of static length is left alone."""
        b = cut.b
        if valid is None and isinstance(cut.candidates, int):
            return matrix
        kept = valid if valid is not None else b.full([cut.batch.size, b.size(index, 1)], True, torch.bool, cut.x)
        whole = b.compare("eq", b.sum(b.cast(kept, torch.int64), 1), cut.valid_count())  # [B]
        same = b.compare("eq", b.unsqueeze(index, 2), b.arange(cut.candidates, cut.x))  # [B, K, M]
        return b.where(b.unsqueeze(b.unsqueeze(whole, 1), 1), b.cast(same, torch.float32), matrix)

    def _nearest(self, cut: Cut, cosine: Any) -> Any:
        """Leave only the most similar candidates of each row."""
        b = cut.b
        if cut.valid is not None:
            cosine = b.where(b.unsqueeze(cut.inner(cut.valid), 1), cosine, LOWEST)
        count = b.min_sizes(self.neighbours, cut.candidates)
        best = b.call(aten.topk.default, cosine, count, 2)
        least = b.amin(b.parts(best, 2)[0], 2, keepdim=True)  # [B, K, 1]
        return b.where(b.compare("ge", cosine, least), cosine, LOWEST)
