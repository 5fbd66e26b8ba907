"""Part of a budget by importance within frames, the rest evenly."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.ordering import ascending, masked, topk
from tokcc.passes.piece import OtherScore, Selector
from tokcc.passes.selectors.frame_quotas import frame_sizes

__all__ = ["FrameShares"]

aten = torch.ops.aten


class FrameShares(Selector):
    """Give frames quotas by a score of frames, keep the best tokens of each, and fill up evenly (CaCoVID).

    arXiv:2602.01649. With t frames of m tokens and a budget of ``kappa t m`` tokens: ``yhat = 3 y / max |y|``;
    ``pi = softmax(yhat)``, clipped to ``[1 / (2 t), most / (t kappa)]`` and normalised again;
    ``n_f = clip(round(pi_f P), 1, int(rho m most))`` with ``P = round(rho kappa t m)``. While the sum is not
    ``Q = floor(rho kappa t m)``, the largest quota loses one or the smallest gains one. The rest of the budget is taken
    at even steps from the unselected tokens in order.

    Attributes:
        frame_score: y: a score with one value for all tokens of a frame.
        frames: t.
        important: rho.
        most: The largest share of a frame's tokens.
    """

    kind: ClassVar[str] = "frame_shares"

    frame_score: OtherScore
    frames: int = Field(ge=1)
    important: float = Field(default=0.5, ge=0.0, le=1.0)
    most: float = Field(default=0.5, gt=0.0, le=1.0)

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`FrameShares`."""
        frames = self.frames
        size, total = frame_sizes(cut, frames)
        rho, most = Fraction(str(self.important)), Fraction(str(self.most))
        share = cut.count.amount if cut.count.kind == "share" else Fraction(total, frames * size)
        wanted = math.floor(rho * share * frames * size)
        cap = max(1, math.floor(rho * size * most))
        rating = cut.inner(masked(cut, score))  # [B, M]
        best = None
        if wanted:
            quota = self._quotas(cut, size, share, wanted, cap)
            best = self._best_of_frames(cut, rating, quota, size, wanted)
        index = self._filled(cut, best, total - wanted, frames * size)
        return Kept(cut.with_protected(index), None, True, total + cut.first + cut.last, score)

    def _quotas(self, cut: Cut, size: int, share: Fraction, wanted: int, cap: int) -> Any:
        """Return int64 ``[B, F]`` of sum ``wanted``."""
        b, frames = cut.b, self.frames
        every = cut.inner(b.cast(self.frame_score.emit(cut), torch.float32))
        y = b.slice(every, 1, 0, None, size)  # the first token of each frame
        largest = b.clamp_min(b.amax(b.call(aten.abs.default, y), 1, keepdim=True), 1e-12)
        pi = b.softmax(b.mul(b.div(y, largest), 3.0), 1)
        low, high = 1 / (2 * frames), float(Fraction(str(self.most)) / (frames * share))
        pi = b.call(aten.clamp.default, pi, low, max(high, low))
        pi = b.div(pi, b.sum(pi, 1, keepdim=True))
        goal = math.floor(Fraction(str(self.important)) * share * frames * size + Fraction(1, 2))
        # Halves up, which a float cannot tell from what lies just below.
        quota = b.cast(b.call(aten.floor.default, b.add(b.mul(pi, float(goal)), 0.5)), torch.int64)
        quota = b.call(aten.clamp.default, quota, 1, cap)
        # Filling up may go beyond the cap, when that is too low for the sum.
        return self._repaired(cut, quota, wanted, max(cap, -(-wanted // frames)))

    def _repaired(self, cut: Cut, quota: Any, wanted: int, cap: int) -> Any:
        """Bring the sum to ``wanted``, one by one: from the first largest, to the first smallest quota.

        Taking one from the largest again and again levels the top: frame f gives what lies above a level, and the
        first ones of those at the level one more. That is found by counting, without a loop: of all single tokens
        ``(f, i)`` the ``wanted`` lowest in the order ``(i, -f)`` stay. Adding to the smallest is the same from below.
        """
        b, frames = cut.b, self.frames
        zero = b.full([cut.batch.size, frames], 0, torch.int64, cut.x)
        step = b.arange(cap, cut.x)  # [cap]
        place = b.unsqueeze(b.arange(frames, cut.x), 1)  # [F, 1]
        total = b.unsqueeze(b.sum(quota, 1, keepdim=True), 2)  # [B, 1, 1]
        there = b.compare("lt", step, b.unsqueeze(quota, 2))  # [B, F, cap]
        # Taken away: the highest levels first, at one level the lower frame first. Added: the lowest levels first.
        key = b.where(
            b.compare("gt", total, wanted),
            b.add(b.mul(step, frames), b.add(b.mul(place, -1), frames - 1)),
            b.add(b.mul(step, frames), place),
        )
        more = b.compare("le", total, wanted)
        # What is there stays when tokens are added; what is not there cannot stay when tokens are taken away.
        key = b.where(b.logical_and(there, more), b.add(key, -2 * frames * cap), key)
        lost = b.logical_and(b.logical_not(there), b.logical_not(more))
        key = b.where(lost, b.add(key, 2 * frames * cap), key)
        flat = b.reshape(b.cast(b.mul(key, -1), torch.float32), [cut.batch.size, frames * cap])
        stay = topk(b, flat, wanted, in_order=False)  # [B, wanted]
        frame = b.call(aten.div.Tensor_mode, stay, cap, rounding_mode="floor")
        hit = b.compare("eq", b.unsqueeze(frame, 1), place)  # [B, F, wanted]
        return b.add(zero, b.sum(b.cast(hit, torch.int64), 2))

    def _best_of_frames(self, cut: Cut, rating: Any, quota: Any, size: int, wanted: int) -> Any:
        """Return int64 ``[B, wanted]``: the best of each frame up to its quota."""
        b, frames = cut.b, self.frames
        rows = b.reshape(rating, [cut.batch.size, frames, size])
        # The rank of a token: how many of its frame are better, or as good and before it.
        one, other = b.unsqueeze(rows, 3), b.unsqueeze(rows, 2)
        place = b.arange(size, cut.x)
        before = b.compare("gt", b.unsqueeze(place, 1), b.unsqueeze(place, 0))
        better = b.logical_or(b.compare("gt", other, one), b.logical_and(b.compare("eq", other, one), before))
        rank = b.sum(b.cast(better, torch.int64), 3)  # [B, F, size]
        flags = b.cast(b.compare("lt", rank, b.unsqueeze(quota, 2)), torch.float32)
        return topk(b, b.reshape(flags, [cut.batch.size, frames * size]), wanted, in_order=False)

    def _filled(self, cut: Cut, best: Any, more: int, size: int) -> Any:
        """Add ``more`` of the other candidates at even steps; int64 ``[B, K]``, ascending."""
        b = cut.b
        if more == 0:
            return ascending(b, best)
        taken = 0 if best is None else b.shape(best)[1]
        left = size - taken
        flags = b.full([cut.batch.size, size], 1.0, torch.float32, cut.x)
        if best is not None:
            flags = b.scatter(flags, 1, best, b.full([cut.batch.size, taken], 0.0, torch.float32, cut.x))
        others = topk(b, flags, left, in_order=False)  # equal flags stand in order
        steps = [math.floor(Fraction(i * (left - 1), max(more - 1, 1)) + Fraction(1, 2)) for i in range(more)]
        chosen = b.constant("tokcc_even_steps", torch.tensor(steps))
        evenly = b.call(aten.index_select.default, others, 1, chosen)
        return ascending(b, evenly if best is None else b.cat([best, evenly], 1))
