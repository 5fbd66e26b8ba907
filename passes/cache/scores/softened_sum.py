"""Accumulated attention at a rising temperature."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.piece import CacheScore

__all__ = ["SoftenedSum"]


class SoftenedSum(CacheScore):
    """The attention that an entry received so far, with softened logits (Keyformer, arXiv:2403.09054), without noise.

    ``f += sum_i softmax(x_i / tau)``, mean over the group. A call with more than one token is text: ``tau = start``.
    The t-th single token has ``tau = start + t (end - start) / over``, at most ``end``. The attention itself stays as
    it is, so a second softmax over all rows runs beside it, see :meth:`CacheCut.received_at`; with ``start = end = 1``
    there is none and this is H2O's sum.

    The number of generated tokens travels with the entries: each remembers the t of its call.

    Attributes:
        start: Temperature of the prompt.
        end: Temperature after ``over`` generated tokens.
        over: Generated tokens until ``end``.
    """

    kind: ClassVar[str] = "softened_sum"
    states: ClassVar[tuple[str, ...]] = ("key_score", "key_step")

    start: float = Field(default=1.0, gt=0)
    end: float = Field(default=2.0, gt=0)
    over: int = Field(default=512, ge=1)

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`SoftenedSum`."""
        b = cut.b
        step = self._step(cut)  # [B, 1, 1]
        fresh = b.full([b.size(cut.key, 0), cut.kv_heads, cut.new], 0.0, torch.float32, cut.key)
        cut.left["key_step"] = b.cat([cut.states["key_step"], b.add(fresh, step)], 2)
        if self.start == self.end == 1.0:
            received = cut.received
        else:
            part = b.call(torch.ops.aten.clamp_max.default, b.div(step, float(self.over)), 1.0)
            temperature = b.add(b.mul(part, self.end - self.start), self.start)
            received = cut.received_at(b.unsqueeze(temperature, 3))
        total = b.add(b.cat([cut.states["key_score"], fresh], 2), received)
        cut.left["key_score"] = total
        return total

    def _step(self, cut: CacheCut) -> Any:
        """Return t of this call, fp32 ``[B, 1, 1]``: one more than the last for a single token, 0 for text."""
        b = cut.b
        nothing = b.full([b.size(cut.key, 0), cut.kv_heads, 1], 0.0, torch.float32, cut.key)
        known = b.cat([cut.states["key_step"], nothing], 2)  # never empty
        latest = b.amax(b.amax(known, 2, keepdim=True), 1, keepdim=True)
        return b.where(cut.is_text(), 0.0, b.add(latest, 1.0))
