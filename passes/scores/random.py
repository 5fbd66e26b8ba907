"""The random baseline."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cut import Cut
from tokcc.passes.piece import Score

__all__ = ["Random"]

_PERIOD = 4096


class Random(Score):
    """A fixed random order by position, the same for every sample; it depends on the step's seed and the layer."""

    kind: ClassVar[str] = "random"

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        generator = torch.Generator().manual_seed(cut.seed * 1000003 + cut.layer)
        # One table for all lengths, so that static and dynamic graphs, long and short samples choose alike.
        table = torch.randperm(_PERIOD, generator=generator).to(torch.float32) / _PERIOD
        name = f"tokcc_random_{cut.layer}"
        if isinstance(cut.tokens, int):
            repeats = -(-cut.tokens // _PERIOD)
            return cut.per_sample(b.constant(name, table.repeat(repeats)[: cut.tokens].clone()))
        index = b.call(torch.ops.aten.remainder.Scalar, cut.positions(), _PERIOD)
        return cut.per_sample(b.call(torch.ops.aten.index_select.default, b.constant(name, table), 0, index))
