"""Part by importance, part by distance from each other, in features and in space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.inputs import EngineInput, Guided
from tokcc.passes.ordering import LOWEST, ascending, masked, topk
from tokcc.passes.piece import Selector
from tokcc.passes.places import DEPTH, points_of_depth

__all__ = ["SalientAndFar"]

aten = torch.ops.aten
_POINTS = (
    EngineInput("points", ("B", "N", 3), "place in space of every token but special ones, in any unit of length"),
    EngineInput("points_known", ("B", "N"), "which rows of `points` are known", torch.bool, low=0, high=1),
)


class SalientAndFar(Guided, Selector):
    """Keep the most important tokens, and of the others those farthest from each other (SeGPruner, arXiv:2603.29437).

    The others are picked farthest-point first, from the most important of them on; distances to the important tokens
    do not count. The distance is ``lam |p_i - p_j| / d + (1 - lam) (1 - cos(x_i, x_j))`` with the tokens' places p in
    space and d the largest distance of any of the others from the first pick. Where the place of either token is not
    known, the cosine alone counts (ours).

    Attributes:
        important: Share of the budget that is kept by score alone, rounded down.
        space: lam; 0 = no places are read.
        of: Vectors that the cosine is measured on.
        places: ``points`` = the caller gives the places, fp32 ``[B, N, 3]``, and ``points_known``, bool ``[B, N]``:
            without depth a place would fall on the camera. ``depth`` = they are computed from depth, intrinsics and
            pose, see :mod:`tokcc.passes.places`.
        patch: With ``depth``: pixels of a token's side; the tokens are a square.
    """

    kind: ClassVar[str] = "salient_and_far"

    important: float = Field(default=0.5, ge=0.0, le=1.0)
    space: float = Field(default=0.5, ge=0.0, le=1.0)
    of: FeatureKind = "features"
    places: Literal["points", "depth"] = "points"
    patch: int = Field(default=14, ge=1)

    def inputs(self) -> Sequence[EngineInput]:
        """Return the places, where they count."""
        if self.space == 0.0:
            return ()
        return _POINTS if self.places == "points" else DEPTH

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`SalientAndFar`."""
        b, size = cut.b, cut.candidates
        kept = cut.count.kept(b, size, cut.initial_candidates)
        if cut.valid is not None or not isinstance(size, int) or not isinstance(kept, int):
            cut.ctx.fail("a budget in two parts needs a fixed number of tokens, without padding",
                         help="export the model with a fixed number of tokens and without a padding mask")  # fmt: skip
        best = math.floor(Fraction(str(self.important)) * kept)
        rating = cut.inner(masked(cut, score))  # [B, M]
        order = topk(b, rating, size, in_order=False)
        parts = [b.slice(order, 1, 0, best)] if best else []
        if best < kept:
            taken = b.full([cut.batch.size, best], True, torch.bool, cut.x)
            none = b.full([cut.batch.size, size], False, torch.bool, cut.x)
            gone = b.scatter(none, 1, parts[0], taken) if best else none
            centre = b.slice(order, 1, best, best + 1)  # [B, 1]
            near = b.mul(self._distance(cut, gone, centre), -1.0)
            unary = b.where(gone, LOWEST, b.full([cut.batch.size, size], 0.0, torch.float32, cut.x))
            first = b.where(gone, LOWEST, rating)
            parts.append(b.call(torch.ops.tokcc.greedy_select.default, near, unary, first, kept - best))
        index = ascending(b, b.cat(parts, 1))
        return Kept(cut.with_protected(index), None, True, kept + cut.first + cut.last, score)

    def _distance(self, cut: Cut, gone: Any, centre: Any) -> Any:
        """``[B, M, M]``; the scale of space is taken over the tokens that are not ``gone``."""
        b = cut.b
        x = cut.inner(features(cut, self.of, "concat"))  # [B, M, D]
        apart = b.mul(b.sub(b.matmul(x, b.transpose(x, 1, 2)), 1.0), -1.0)
        if self.space == 0.0:
            return apart
        if cut.space.reduced:
            cut.ctx.fail("places are those of all tokens, and some are gone already", help="use it as the first step")
        points, known = self._places(cut)
        step = b.sub(b.unsqueeze(points, 2), b.unsqueeze(points, 1))  # [B, M, M, 3]
        length = b.sqrt(b.sum(b.mul(step, step), 3))
        both = b.logical_and(b.unsqueeze(known, 2), b.unsqueeze(known, 1))
        length = b.where(both, length, 0.0)
        row = b.squeeze(b.call(torch.ops.tokcc.gather_tokens.default, length, centre, 1, 0), 1)  # [B, M]
        scale = b.amax(b.where(gone, 0.0, row), 1, keepdim=True)
        scale = b.where(b.compare("gt", scale, 0.0), scale, 1.0)  # [B, 1]
        mixed = b.add(b.mul(b.div(length, b.unsqueeze(scale, 2)), self.space), b.mul(apart, 1.0 - self.space))
        return b.where(both, mixed, apart)

    def _places(self, cut: Cut) -> tuple[Any, Any]:
        """Return places fp32 ``[B, M, 3]``, and which are known."""
        b, size = cut.b, cut.candidates
        sizes = {"B": cut.batch.size, "N": size}
        if self.places == "points":
            return self.read(b, "points", sizes, cut.x), self.read(b, "points_known", sizes, cut.x)
        side = math.isqrt(size)
        if side * side != size:
            cut.ctx.fail(f"{size} tokens are no square", help="give the places themselves: `places: points`")
        sizes |= {"H": side * self.patch, "W": side * self.patch}
        depth, intrinsics, pose = (self.read(b, spec.name, sizes, cut.x) for spec in DEPTH)
        return points_of_depth(b, depth, intrinsics, pose, side, side)
