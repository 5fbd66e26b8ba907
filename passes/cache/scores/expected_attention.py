"""Attention that future queries are expected to pay."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cache.cut import LOWEST, CacheCut
from tokcc.passes.cache.piece import CacheScore

__all__ = ["ExpectedAttention"]

aten = torch.ops.aten


class ExpectedAttention(CacheScore):
    """The attention that the queries of the next ``ahead`` positions are expected to pay (arXiv:2510.00636).

    Queries of the text before they are turned, without the protected first tokens, have a mean m and a covariance S in
    each head. The mean of the rotations of the next positions, R, turns both: ``m' = R m``, ``S' = R S R^T``. An entry
    has the logit ``m' k / sqrt(D) + k^T S' k / (2 D)``, the mean of ``exp`` over a normal distribution of queries; a
    softmax over the entries, the mean over the group, and the length of its value make the score.

    Attributes:
        ahead: Future positions.
        covariance: Count the spread of the queries, and not their mean alone.
        values: Multiply by the length of the values.
        eps: Added to the probabilities before that.
    """

    kind: ClassVar[str] = "expected_attention"
    once: ClassVar[bool] = True
    keeps_sinks: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = True

    ahead: int = Field(default=512, ge=1)
    covariance: bool = True
    values: bool = True
    eps: float = Field(default=0.0, ge=0)

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`ExpectedAttention`."""
        b, heads = cut.b, cut.kv_heads
        width = int(b.shape(cut.query)[3])
        query = b.cast(cut.unturned, torch.float32)  # [B, H, S, D]
        counted = b.logical_and(cut.real, b.compare("ge", cut.rank(), cut.sinks))
        weight = b.cast(b.slice(counted, 1, cut.past, None), torch.float32)  # [B, S]
        weight = b.div(weight, b.clamp_min(b.sum(weight, 1, keepdim=True), 1.0))
        rows = b.unsqueeze(b.unsqueeze(weight, 1), 1)  # [B, 1, 1, S]
        mean = b.matmul(rows, query)  # [B, H, 1, D]
        rotation = self._mean_rotation(cut, width)  # [B, 1, D, D]: row c is where the c-th unit vector goes
        key = b.unsqueeze(b.cast(cut.key, torch.float32), 2)  # [B, Hkv, 1, L, D]

        def grouped(x: Any) -> Any:
            return b.reshape(x, [-1, heads, cut.heads // heads, *b.shape(x)[2:]])

        ahead = mean if rotation is None else b.matmul(mean, rotation)
        logits = b.mul(b.sum(b.mul(key, grouped(ahead)), 4), cut.scale)  # [B, Hkv, G, L]
        if self.covariance:
            apart = b.sub(query, mean)
            spread = b.matmul(b.transpose(b.mul(apart, b.transpose(rows, 2, 3)), 2, 3), apart)  # [B, H, D, D]
            if rotation is not None:
                spread = b.matmul(b.matmul(b.transpose(rotation, 2, 3), spread), rotation)
            bent = b.sum(b.mul(b.matmul(key, grouped(spread)), key), 4)
            logits = b.add(logits, b.mul(bent, cut.scale * cut.scale / 2))
        real = b.unsqueeze(b.unsqueeze(cut.real, 1), 1)
        score = b.mean(b.softmax(b.where(real, logits, LOWEST), 3), 2)  # [B, Hkv, L]
        if not self.values:
            return score
        value = b.cast(cut.value, torch.float32)
        return b.mul(b.add(score, self.eps), b.sqrt(b.sum(b.mul(value, value), 3)))

    def _mean_rotation(self, cut: CacheCut, width: int) -> Any:
        """Return fp32 ``[B, 1, D, D]``, or None where the model does not turn its queries."""
        if cut.turn is None:
            return None
        b = cut.b
        last = b.amax(cut.positions, 1, keepdim=True)  # [B, 1]
        future = b.add(last, b.arange(self.ahead + 1, cut.key, start=1))  # [B, n]
        units = b.constant(f"units_{width}", torch.eye(width)[None, :, None, :])
        units = b.expand(b.cast(units, b.dtype(cut.query)), [b.size(cut.query, 0), -1, self.ahead, -1])  # [B, D, n, D]
        turned = b.cast(cut.turned(units, future), torch.float32)
        return b.unsqueeze(b.mean(turned, 2), 1)
