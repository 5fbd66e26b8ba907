"""The random baseline."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cut import Cut
from tokcc.passes.piece import Score

__all__ = ["Random"]

_PERIOD = 4096


class Random(Score):
    """A fixed random order, the same for every sample; it depends on the step's seed and the layer."""

    kind: ClassVar[str] = "random"

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        generator = torch.Generator().manual_seed(cut.seed * 1000003 + cut.layer)
        if isinstance(cut.tokens, int):
            table = torch.rand(cut.tokens, generator=generator)
            return cut.per_sample(b.constant(f"tokcc_random_{cut.layer}", table))
        table = torch.randperm(_PERIOD, generator=generator).to(torch.float32) / _PERIOD
        constant = b.constant(f"tokcc_random_{cut.layer}", table)
        index = b.call(torch.ops.aten.remainder.Scalar, cut.positions(), _PERIOD)
        return cut.per_sample(b.call(torch.ops.aten.index_select.default, constant, 0, index))
