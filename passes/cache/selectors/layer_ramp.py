"""Capacities that fall from layer to layer."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from tokcc.passes.budget import Count
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.selectors.best import Best

__all__ = ["LayerRamp"]


class LayerRamp(Best):
    """Keep the best entries, more in early layers than in late ones (PyramidKV, arXiv:2406.02069).

    With a capacity C, W recent entries, T tokens so far and ``base = C - W``: everything while ``T < C``; C while
    ``T < 2 base``; then a linear ramp from ``hi`` in the first layer of the model to ``lo`` in the last, W on top, with
    ``lo = base // beta`` and ``hi = 2 base - lo``, both moved where ``hi`` exceeds ``T - W``. Integer steps make the
    sum exceed layers x C a little, as published. T counts padding: the longest row of a batch decides.

    Attributes:
        beta: How much less than the mean the last layer keeps.
    """

    kind: ClassVar[str] = "layer_ramp"
    by_layer: ClassVar[bool] = True

    beta: int = Field(default=20, ge=1)

    def capacity(self, cut: CacheCut, planned: Count) -> Any:
        """See :class:`LayerRamp`."""
        b, seen, window = cut.b, cut.seen, cut.recent
        mean = int(planned.amount) if planned.kind == "tokens" else planned.kept(b, seen, seen)
        base = b.max_sizes(b.sub_sizes(mean, window), 0)
        twice = b.mul_sizes(base, 2)
        least = b.floordiv_sizes(base, self.beta)
        high = b.min_sizes(b.sub_sizes(twice, least), b.max_sizes(b.sub_sizes(seen, window), 0))
        low = b.max_sizes(b.sub_sizes(twice, high), 0)
        step = b.floordiv_sizes(b.max_sizes(b.sub_sizes(high, low), 0), max(cut.num_layers - 1, 1))
        ramp = b.add_sizes(b.sub_sizes(high, b.mul_sizes(step, cut.layer)), window)
        # 1 from T = max(C, 2 base) on, 0 before.
        until = b.max_sizes(mean, twice)
        steep = b.min_sizes(b.max_sizes(b.sub_sizes(b.add_sizes(seen, 1), until), 0), 1)
        return b.add_sizes(mean, b.mul_sizes(steep, b.sub_sizes(ramp, mean)))
