"""What a state-space mixer makes of each token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cut import Cut
from tokcc.passes.piece import Score

__all__ = ["MixerOutput"]

aten = torch.ops.aten


class MixerOutput(Score):
    """Sum over the channels of what the layer's mixer gives a token, gated, in front of its output projection.

    The directions of a mixer are summed in the order of the tokens first (ToP-ViM, arXiv:2409.18962).

    Attributes:
        clip: Count what is negative as zero.
    """

    kind: ClassVar[str] = "mixer_output"
    needs: ClassVar[frozenset[str]] = frozenset({"mixer"})

    clip: bool = True

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        y = b.cast(cut.mixed(), torch.float32)  # [B, N, E]
        return b.sum(b.call(aten.relu.default, y) if self.clip else y, 2)
