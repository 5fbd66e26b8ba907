"""Clusters of similar tokens."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from tokcc.passes.cut import Assigned, Cut
from tokcc.passes.features import normalised
from tokcc.passes.piece import Selector

__all__ = ["KMeans"]

aten = torch.ops.aten


class KMeans(Selector):
    """Spherical k-means in a fixed number of rounds; a cluster becomes the mean of its tokens, each at unit length.

    In a round every token joins the centre of largest cosine, and a centre moves to the mean of its tokens; one that
    nobody joins stays where it is (VQToken, arXiv:2503.16980, which starts at random).

    Attributes:
        rounds: How many.
        start: The first centres: ``uniform`` = tokens ``floor(i * n / K)``, or ``far`` = tokens picked one by one, each
            farthest from its nearest picked one.
    """

    kind: ClassVar[str] = "kmeans"
    wants_score: ClassVar[bool] = False

    rounds: int = Field(default=10, ge=1)
    start: Literal["uniform", "far"] = "uniform"

    def select(self, cut: Cut, score: Any) -> Assigned:
        """See :class:`KMeans`."""
        del score
        b, size = cut.b, cut.candidates
        if cut.valid is not None:
            cut.ctx.fail("padding would be clustered", help="use a model without a padding mask")
        kept = cut.count.kept(b, size, cut.initial_candidates)
        x = b.cast(cut.inner(cut.x), torch.float32)
        unit = normalised(b, x)  # [B, M, C]
        slots = b.unsqueeze(b.arange(kept, cut.x), 1)  # [K, 1]
        places = b.arange(size, cut.x)
        first = b.unsqueeze(self._first(cut, unit, kept), 2)  # [B, K, 1]
        mean = b.cast(b.compare("eq", first, places), torch.float32)  # [B, K, M]
        for _ in range(self.rounds):
            centre = normalised(b, b.matmul(mean, unit))  # [B, K, C]
            to = b.argmax(b.matmul(unit, b.transpose(centre, 1, 2)), 2)  # [B, M]
            members = b.cast(b.compare("eq", b.unsqueeze(to, 1), slots), torch.float32)  # [B, K, M]
            count = b.sum(members, 2, keepdim=True)
            mean = b.where(b.compare("gt", count, 0.5), b.div(members, b.clamp_min(count, 1.0)), mean)
        member = b.argmax(mean, 2)  # [B, K]: the first one; the nearest one is not told apart from its twin
        length = b.sqrt(b.clamp_min(b.sum(b.mul(x, x), 2), 1e-24))  # [B, M]
        matrix = b.div(mean, b.unsqueeze(length, 1))
        return Assigned(matrix, member, b.add_sizes(kept, cut.first + cut.last))

    def _first(self, cut: Cut, unit: Any, kept: Any) -> Any:
        """Return the tokens that the first centres are, int64 ``[B, K]``."""
        b, size = cut.b, cut.candidates
        if self.start == "uniform":
            steps = b.mul(b.arange(kept, cut.x), size)
            return cut.per_sample(b.call(aten.div.Tensor_mode, steps, kept, rounding_mode="floor"))
        cosine = b.matmul(unit, b.transpose(unit, 1, 2))
        zeros = b.full([cut.batch.size, size], 0.0, torch.float32, cut.x)
        return b.call(torch.ops.tokcc.greedy_select.default, cosine, zeros, zeros, kept)
