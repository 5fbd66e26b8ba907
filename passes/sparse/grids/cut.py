"""What chooses the regions of a grid that are read works with: the attention of one layer, region by region."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tokcc.ir.builder import Builder

__all__ = ["GridCut"]


@dataclass
class GridCut:
    """The attention of one layer, before anything is computed.

    The patches stand region by region, M regions of ``inside`` patches each; the other tokens stand behind them.

    Attributes:
        b: The builder.
        layer: 0-based layer.
        batch: B.
        query: ``[B, H, N, D]``.
        key: ``[B, H, N, D]``.
        value: ``[B, H, N, Dv]``.
        regions: M.
        inside: Patches of a region.
        others: Tokens that are no patches.
        scale: Factor of the logits.
    """

    b: Builder
    layer: int
    batch: Any
    query: Any
    key: Any
    value: Any
    regions: int
    inside: int
    others: int
    scale: float

    @property
    def patches(self) -> int:
        """Tokens that are patches."""
        return self.regions * self.inside

    @property
    def other_blocks(self) -> tuple[int, ...]:
        """Blocks, as long as regions, that the other tokens fill; the last one may be cut short."""
        return tuple(self.regions + i for i in range(-(-self.others // self.inside)))

    @cached_property
    def query_means(self) -> Any:
        """The mean query of every region, all heads beside each other, fp32 ``[B, M, H D]``."""
        return self._means(self.query)

    @cached_property
    def key_means(self) -> Any:
        """The mean key of every region, all heads beside each other, fp32 ``[B, M, H D]``."""
        return self._means(self.key)

    def _means(self, x: Any) -> Any:
        b = self.b
        _, heads, _, width = b.shape(x)
        cells = b.reshape(b.slice(x, 2, 0, self.patches), [self.batch, heads, self.regions, self.inside, width])
        means = b.permute(b.mean(b.cast(cells, torch.float32), 3), [0, 2, 1, 3])
        return b.reshape(means, [self.batch, self.regions, heads * width])
