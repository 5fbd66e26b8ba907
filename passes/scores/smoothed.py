"""A score averaged over the layers that a token has passed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from pydantic import Field

from tokcc.passes.cut import AttentionView, Cut
from tokcc.passes.noted import noted
from tokcc.passes.piece import OtherScore, Score

__all__ = ["Smoothed"]


class Smoothed(Score):
    """``c_0 = s_0``, ``c_l = (1 - rate) c_{l-1} + rate s_l`` over all layers up to the cut's own (FlowCut).

    Each layer's score is over the tokens that it ran on: where an earlier cut dropped tokens, the average of those that
    are left goes on (arXiv:2505.19536).

    Attributes:
        of: The score s.
        rate: Weight of the newest layer.
    """

    kind: ClassVar[str] = "smoothed"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    of: OtherScore
    rate: float = Field(default=0.5, gt=0.0, le=1.0)

    def layers(self, layer: int, num_layers: int) -> tuple[int, ...]:
        """Return all layers up to this one."""
        del num_layers
        return tuple(range(layer + 1))

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        last, average = self._so_far(cut)
        for layer in range(last + 1, cut.layer + 1):
            own = self.of.emit(replace(cut, layer=layer, attention=partial(_attention_at, cut, layer)))
            blended = None if average is None else b.add(b.mul(average, 1.0 - self.rate), b.mul(own, self.rate))
            average = own if blended is None else blended
        cut.space.notes[self] = cut.layer, average
        return average

    def _so_far(self, cut: Cut) -> tuple[int, Any]:
        """Return the layer of the last cut that noted its average, and that average of the tokens that are left."""
        known = noted(cut, self)
        if known is None:
            return -1, None
        (layer, average), now = known
        return layer, now(average)


def _attention_at(cut: Cut, own: int, layer: int | None = None) -> AttentionView:
    return cut.attention(own if layer is None else layer)
