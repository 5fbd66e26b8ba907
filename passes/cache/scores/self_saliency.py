"""How much a token attends to itself."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.ir.builder import Builder
from tokcc.passes.cache.cut import LOWEST, CacheCut
from tokcc.passes.cache.piece import CacheScore
from tokcc.passes.capping import capped

__all__ = ["SelfSaliency"]

_EPS = 1e-6
_TINY = 1e-30
"""Stands for 0 under a logarithm whose factor is 0, too."""


class SelfSaliency(CacheScore):
    """How far a token's attention to a window moves when it may not attend to itself (STILL, arXiv:2602.02180).

    With ``a`` the softmax over the ``window`` slots up to a token's own and ``a0`` the same without its own, the
    divergence is ``sum_j a_j * log((a_j + eps) / (a0_j + eps))``. As ``a0_j = a_j / (1 - a_t)``, that is
    ``a_t * log((a_t + eps) / eps) + (1 - a_t) * log(1 - a_t)``, which from ``eps`` on grows with ``a_t``. It is found
    when a token comes in, mean over the query heads of a key head, and carried along: later queries change nothing.
    The window counts slots, which are the tokens before where as many recent ones are protected. Costs a product with
    at most ``2 * window`` keys for each query.

    Attributes:
        window: Slots that a token is compared with, its own included.
    """

    kind: ClassVar[str] = "self_saliency"
    states: ClassVar[tuple[str, ...]] = ("key_saliency",)

    window: int = Field(default=128, ge=1)

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`SelfSaliency`."""
        b = cut.b
        own = self._own(cut)  # [B, Hkv, G, S]
        other = b.add(b.mul(own, -1.0), 1.0)
        there = b.mul(own, b.log(b.mul(b.add(own, _EPS), 1.0 / _EPS)))
        gone = b.mul(other, b.log(b.clamp_min(other, _TINY)))
        total = b.cat([cut.states["key_saliency"], b.mean(b.add(there, gone), 2)], 2)
        cut.left["key_saliency"] = total
        return total

    def _own(self, cut: CacheCut) -> Any:
        """Return what each of the call's queries gives its own slot, fp32 ``[B, Hkv, G, S]``.

        Queries fall into blocks, each of which reads the keys that any of its queries sees.
        """
        b, before = cut.b, self.window - 1
        rows = b.min_sizes(self.window, cut.new)  # R
        blocks = b.floordiv_sizes(b.add_sizes(cut.new, before), self.window)  # M
        wide = b.add_sizes(rows, before)
        width, groups = int(b.shape(cut.query)[3]), cut.heads // cut.kv_heads
        # The last block is filled up with the last query, whose copies are cut off again.
        tokens = _up_to(b, b.arange(b.mul_sizes(blocks, rows), cut.key), b.arange(cut.new, cut.key))
        query = b.mul(b.call(torch.ops.aten.index_select.default, cut.query, 2, tokens), cut.scale)
        query = b.reshape(query, [-1, cut.kv_heads, groups, blocks, rows, width])
        query = b.reshape(
            b.permute(query, [0, 1, 3, 2, 4, 5]), [-1, cut.kv_heads, blocks, b.mul_sizes(rows, groups), width]
        )
        first = b.sub(b.add(b.mul(b.arange(blocks, cut.key), rows), cut.past), before)  # [M]
        place = b.add(b.unsqueeze(first, 1), b.arange(wide, cut.key))  # [M, wide]: slots, some of them none
        flat = b.reshape(_up_to(b, b.call(torch.ops.aten.clamp_min.default, place, 0), cut.slots()), [-1])
        key = b.call(torch.ops.aten.index_select.default, cut.key, 2, flat)
        key = b.reshape(key, [-1, cut.kv_heads, blocks, wide, width])
        logits = b.cast(b.matmul(query, b.transpose(key, 3, 4)), torch.float32)  # [B, Hkv, M, G * R, wide]
        logits = capped(b, logits, cut.softcap)
        logits = b.reshape(logits, [-1, cut.kv_heads, blocks, groups, rows, wide])
        apart = b.sub(b.arange(wide, cut.key), b.unsqueeze(b.arange(rows, cut.key), 1))  # [R, wide]
        near = b.logical_and(b.compare("ge", apart, 0), b.compare("le", apart, before))
        real = b.reshape(b.call(torch.ops.aten.index_select.default, cut.real, 1, flat), [-1, blocks, 1, wide])
        known = b.logical_and(real, b.unsqueeze(b.compare("ge", place, 0), 1))  # [B, M, 1, wide]
        itself = b.compare("eq", apart, before)
        seen = b.unsqueeze(b.unsqueeze(b.logical_or(b.logical_and(known, near), itself), 1), 3)
        probs = b.softmax(b.where(seen, logits, LOWEST), 5)  # [B, Hkv, M, G, R, wide]
        own = b.permute(b.sum(b.where(itself, probs, 0.0), 5), [0, 1, 3, 2, 4])
        return b.slice(b.reshape(own, [-1, cut.kv_heads, groups, b.mul_sizes(blocks, rows)]), 3, 0, cut.new)


def _up_to(b: Builder, places: Any, known: Any) -> Any:
    """Return places, int64 of any shape, no larger than the last of ``0, 1, ...``."""
    return b.call(torch.ops.aten.minimum.default, places, b.amax(known, 0))
