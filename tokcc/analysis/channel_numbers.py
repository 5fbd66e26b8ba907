"""In which channels the products of a head's queries and keys are large."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokcc.analysis.head_numbers import Heard

__all__ = ["ChannelSums", "Channels"]

Channels = tuple[tuple[tuple[int, ...], ...], ...]
"""Of each layer and head all channels, the most important one first."""


@dataclass
class ChannelSums:
    """Sums ``|q_c * k_c|`` over the tokens of some texts, query and key of one token each, turned as they are read.

    Their order is that of the means (Double Sparsity, arXiv:2408.07092, 3.1).

    Attributes:
        sums: By layer, ``[Hkv, G, D]``.
    """

    sums: dict[int, Tensor] = field(default_factory=dict)

    def hear(self, heard: Heard) -> None:
        """Take in the attention of one layer to one text."""
        kv_heads, rows, width = heard.key.shape
        query = heard.query.double().reshape(kv_heads, -1, rows, width)
        found = (query * heard.key.double()[:, None]).abs().sum(2)
        self.sums[heard.layer] = self.sums.get(heard.layer, torch.zeros_like(found)) + found

    def of_key_heads(self) -> Channels:
        """Return the order by the sum over the query heads that read a key head."""
        return tuple(_ordered(table.sum(1)) for _, table in sorted(self.sums.items()))

    def of_query_heads(self) -> Channels:
        """Return the order for each query head."""
        return tuple(_ordered(table.flatten(0, 1)) for _, table in sorted(self.sums.items()))


def _ordered(table: Tensor) -> tuple[tuple[int, ...], ...]:
    """Return the order of each row, largest first; of equal ones the earlier channel."""
    return tuple(tuple(row) for row in table.argsort(dim=-1, descending=True, stable=True).tolist())
