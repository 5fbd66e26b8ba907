"""Which pairs of channels alone would find the keys that a head attends to most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokcc.analysis.head_numbers import Heard
from tokcc.analysis.rotation_pairs import Pairs

__all__ = ["OrderedPairs", "PairAgreement"]

OrderedPairs = tuple[tuple[Pairs, ...], ...]
"""Of each layer and head all pairs of channels, the most telling one first."""
QUERIES = 32
"""Queries of a text that are asked, evenly over its second half."""
MOST = 256
"""Keys that count as attended to, in long texts."""
SHARE = 8
"""In shorter texts one of so many tokens."""


@dataclass
class PairAgreement:
    """Compares what single pairs of channels find with what all channels find (FASA, arXiv:2602.03152).

    A query's best keys are those with the largest products, k of them. The agreement of a pair is the share of these
    that are among its own k best, by the products in its two channels alone, turned as they are read. It is averaged
    over queries and texts. Queries of the second half of a text are asked: early ones see few keys, of which every pair
    finds nearly all.

    Attributes:
        pairs: The pairs of channels of each layer's heads.
        sums: By layer, ``[H, pairs]``.
        group: Query heads that read a key head, by layer.
    """

    pairs: Mapping[int, Pairs]
    sums: dict[int, Tensor] = field(default_factory=dict)
    group: dict[int, int] = field(default_factory=dict)

    def hear(self, heard: Heard) -> None:
        """Take in the attention of one layer to one text."""
        heads, length, _ = heard.query.shape
        group = heads // len(heard.key)
        first, second = torch.tensor(self.pairs[heard.layer]).T
        most = min(MOST, max(length // SHARE, 1))
        asked = torch.linspace(length // 2, length - 1, min(QUERIES, length - length // 2)).long()
        behind = torch.arange(length) > asked[:, None]  # [R, S]
        found = torch.zeros(heads, len(first))
        for head in range(heads):
            query, key = heard.query[head, asked].float(), heard.key[head // group].float()
            wanted = _best((query @ key.T).masked_fill(behind, -torch.inf), most)  # [R, S]
            for pair, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
                alone = query[:, a, None] * key[:, a] + query[:, b, None] * key[:, b]
                own = _best(alone.masked_fill(behind, -torch.inf), most)
                found[head, pair] = (wanted & own).sum() / (most * len(asked))
        self.sums[heard.layer] = self.sums.get(heard.layer, torch.zeros_like(found)) + found
        self.group[heard.layer] = group

    def of_query_heads(self) -> OrderedPairs | None:
        """Return the order for each query head; None where nothing was heard."""
        return self._ordered(self.sums)

    def of_key_heads(self) -> OrderedPairs | None:
        """Return the order by the sum over the query heads that read a key head; None likewise."""
        return self._ordered({
            layer: table.reshape(-1, self.group[layer], table.shape[1]).sum(1) for layer, table in self.sums.items()
        })  # fmt: skip

    def _ordered(self, tables: Mapping[int, Tensor]) -> OrderedPairs | None:
        """Return the pairs of each row, the largest first; of equal ones the earlier pair."""
        if not tables:
            return None
        orders = {i: table.argsort(dim=-1, descending=True, stable=True).tolist() for i, table in tables.items()}
        return tuple(tuple(tuple(self.pairs[i][n] for n in row) for row in orders[i]) for i in sorted(orders))


def _best(logits: Tensor, most: int) -> Tensor:
    """Return which of each row are the largest, bool of the same shape."""
    found = torch.zeros_like(logits, dtype=torch.bool)
    return found.scatter(1, logits.topk(most, 1).indices, True)
