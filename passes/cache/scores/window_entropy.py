"""How evenly the last queries of a prompt attend to an entry."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.piece import CacheScore

__all__ = ["WindowEntropy"]

_TINY = 1e-30


class WindowEntropy(CacheScore):
    """Entropy over the last ``window`` queries of the attention that an entry gets, in nats, mean over its group.

    With ``a_i`` the probability that query i gives to the entry and ``p_i = a_i / sum a``, it is ``-sum p_i ln p_i``:
    0 for what one query alone looks at, ``ln window`` for what all need alike. Nothing attended to has entropy 0. The
    window's own columns, which fewer queries see, are cut off, and with them all that queries of padding look at.

    Attributes:
        window: Queries that rate.
    """

    kind: ClassVar[str] = "window_entropy"
    once: ClassVar[bool] = True

    window: int = Field(default=32, ge=1)

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`WindowEntropy`."""
        b = cut.b
        rows = b.min_sizes(self.window, cut.new)
        given = cut.probs(rows)  # [B, Hkv, G, R, L]
        share = b.div(given, b.clamp_min(b.sum(given, 3, keepdim=True), _TINY))
        terms = b.mul(share, b.log(b.clamp_min(share, _TINY)))
        entropy = b.mul(b.mean(b.sum(terms, 3), 2), -1.0)  # [B, Hkv, L]
        return b.where(cut.newest(self.window), 0.0, entropy)
