"""One budget for all frames of a video, by scores that the caller gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Cut, Kept
from tokcc.passes.inputs import EngineInput, Guided
from tokcc.passes.ordering import topk
from tokcc.passes.piece import Selector

__all__ = ["FrameQuotas", "completed", "frame_sizes"]

aten = torch.ops.aten


def frame_sizes(cut: Cut, frames: int) -> tuple[int, int]:
    """Return the number of tokens of a frame, and of those that the budget leaves of all frames together."""
    size = cut.candidates
    kept = cut.count.kept(cut.b, size, cut.initial_candidates)
    if cut.valid is not None or not isinstance(size, int) or not isinstance(kept, int) or size % frames:
        cut.ctx.fail(
            f"the tokens are not those of {frames} frames, one after the other",
            needed=f"a fixed number of tokens that {frames} divides, without padding",
            help="set the parameter `frames`",
        )
    return size // frames, kept


def completed(cut: Cut, wanted: Any, most: int, total: int) -> Any:
    """Round quotas down and complete their sum: int64 ``[B, F]``.

    Frames with the largest remainder get one more each, as far as they have room; what is left then fills the frames
    by falling quota.

    Args:
        cut: The cut.
        wanted: fp32 ``[B, F]``, of sum at most ``total``.
        most: Of any frame.
        total: Of all frames, at most ``F * most``.
    """
    b = cut.b
    frames = b.shape(wanted)[1]
    quota = b.call(aten.clamp_max.default, b.cast(b.call(aten.floor.default, wanted), torch.int64), most)
    missing = b.add(b.mul(b.sum(quota, 1, keepdim=True), -1), total)  # [B, 1]
    room = b.compare("lt", quota, most)
    rest = b.where(room, b.sub(wanted, b.cast(quota, torch.float32)), -1.0)
    turn = b.compare("lt", b.arange(frames, cut.x), missing)  # by rank
    more = b.logical_and(_unsorted(cut, topk(b, rest, frames, in_order=False), turn), room)
    quota = b.add(quota, b.cast(more, torch.int64))
    missing = b.add(b.mul(b.sum(quota, 1, keepdim=True), -1), total)
    order = topk(b, wanted, frames, in_order=False)
    free = b.gather(b.add(b.mul(quota, -1), most), 1, order)
    before = b.sub(b.call(aten.cumsum.default, free, 1), free)
    fill = b.call(aten.minimum.default, b.call(aten.clamp_min.default, b.sub(missing, before), 0), free)
    return b.add(quota, _unsorted(cut, order, fill))


def _unsorted(cut: Cut, order: Any, ranked: Any) -> Any:
    """Put ``[B, F]`` by rank back to the places ``order``."""
    b = cut.b
    zeros = b.call(aten.zeros_like.default, ranked)
    return b.scatter(zeros, 1, order, ranked)


class FrameQuotas(Guided, Selector):
    """Give every frame a share of the budget by the square of its score, and keep tokens of it in even steps (QuoTA).

    arXiv:2503.08689: ``w_f = (100 p_f)^2``, normalised; no frame gets more than it has, what is over goes once to the
    others in proportion. Quotas are rounded down and, so that their sum is the budget for every input, completed by
    largest remainder (ours). Of a frame with n tokens and quota k the tokens ``round(i (n - 1) / (k - 1))`` stay.

    Attributes:
        frames: Number of frames F; their tokens follow each other.
        scores: Name of the input with the scores p, fp32 ``[B, F]`` in [0, 1].
    """

    kind: ClassVar[str] = "frame_quotas"
    wants_score: ClassVar[bool] = False

    frames: int = Field(ge=1)
    scores: str = Field(default="frame_scores", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")

    def inputs(self) -> Sequence[EngineInput]:
        """Return the scores."""
        doc = "how much each frame matters for the question, from 0 to 1; equal numbers = all frames alike"
        return (EngineInput(self.scores, ("B", self.frames), doc, unguided=1.0, low=0.0, high=1.0),)

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`FrameQuotas`."""
        del score
        b = cut.b
        size, total = frame_sizes(cut, self.frames)
        given = self.read(b, self.scores, {"B": cut.batch.size}, cut.x)
        weight = b.add(b.mul(b.mul(given, given), 1e4), 1e-12)  # all zero = all alike
        weight = b.div(weight, b.sum(weight, 1, keepdim=True))
        cap = size / total
        over = b.compare("gt", weight, cap)
        excess = b.sum(b.clamp_min(b.sub(weight, cap), 0.0), 1, keepdim=True)
        under = b.where(over, 0.0, weight)
        grown = b.add(weight, b.mul(b.div(under, b.clamp_min(b.sum(under, 1, keepdim=True), 1e-12)), excess))
        quota = completed(cut, b.mul(b.where(over, cap, grown), float(total)), size, total)
        return Kept(cut.with_protected(self._in_steps(cut, quota, size, total)), None, True,
                    total + cut.first + cut.last)  # fmt: skip

    def _in_steps(self, cut: Cut, quota: Any, size: int, total: int) -> Any:
        """Return int64 ``[B, total]``, ascending: every slot finds its frame and its place there."""
        b = cut.b
        end = b.call(aten.cumsum.default, quota, 1)  # [B, F]
        slot = b.arange(total, cut.x)
        passed = b.compare("le", b.unsqueeze(end, 2), slot)  # [B, F, total]
        frame = b.sum(b.cast(passed, torch.int64), 1)
        place = b.sub(slot, b.gather(b.sub(end, quota), 1, frame))
        steps = b.add(b.gather(quota, 1, frame), -1)
        twice = b.add(b.mul(place, 2 * (size - 1)), steps)
        divisor = b.call(aten.clamp_min.default, b.mul(steps, 2), 1)
        source = b.call(aten.div.Tensor_mode, twice, divisor, rounding_mode="floor")
        return b.add(b.mul(frame, size), source)
