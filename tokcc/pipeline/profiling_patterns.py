"""Which pattern of sparse attention suits each head: the one that catches most of its attention for the same blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokcc.analysis.head_numbers import Heard
from tokcc.passes.piece import written_out
from tokcc.passes.sparse.pattern import SparsePattern
from tokcc.passes.sparse.scores.pooled import Pooled
from tokcc.passes.sparse.selectors.best_rated import BestRated
from tokcc.passes.sparse.selectors.columns_and_distances import ColumnsAndDistances
from tokcc.passes.sparse.selectors.first_and_near import FirstAndNear
from tokcc.pipeline.heard_cut import cut_of

__all__ = ["PatternSearch"]

SIZES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Tokens that a candidate is made for, as a share of the text."""
FIRST = 1 / 8
"""First tokens for each near one, where MInference has 100 and 800. So many columns and distances of a pattern are read
in any case, too, up to the 30 and 100 of MInference: in short texts those would leave nothing to choose."""
COLUMNS = (30 / 830, 100 / 850, 1000 / 5096, 500 / 1200, 3500 / 3600)
"""Columns among columns and distances, as in MInference's candidates."""


@dataclass
class PatternSearch:
    """Hears the attention of a decoder on texts and remembers what every candidate would have read of it.

    MInference (arXiv:2407.02490) compares candidates of equal cost. Here every kind comes in several sizes, and of
    those that read at most ``keep`` of the blocks that are seen, on average over the texts, each head gets the one
    that catches most attention.

    Attributes:
        tokens: Length of the texts.
        block: Queries and keys in a block.
        keep: Share of the blocks that are seen.
    """

    tokens: int
    block: int
    keep: float
    costs: dict[int, Tensor] = field(default_factory=dict)
    caught: dict[int, Tensor] = field(default_factory=dict)
    texts: dict[int, int] = field(default_factory=dict)

    @cached_property
    def candidates(self) -> tuple[SparsePattern, ...]:
        """All patterns, small ones first."""
        return tuple(dict.fromkeys(self._candidates()))

    def _candidates(self) -> Iterator[SparsePattern]:
        for share in SIZES:
            size = max(round(share * self.tokens), 1)
            yield FirstAndNear(first=math.ceil(FIRST * size), near=size)
            for columns in COLUMNS:
                many = round(columns * size)
                first, near = (min(round(FIRST * n), most) for n, most in ((many, 30), (size - many, 100)))
                yield ColumnsAndDistances(columns=many, distances=size - many, first=first, near=near)
            yield BestRated(score=Pooled(), blocks=max(size // self.block, 1))

    def hear(self, heard: Heard) -> None:
        """Take in the attention of one layer on one text."""
        cut, new = cut_of(heard, self.block, self.block), heard.query.shape[1]
        by_row = cut.by_query(heard.probs[None], 2).sum(3)  # [1, H, MQ, L]
        mass = cut.by_key(by_row, 3).sum(4)[0] / new  # [H, MQ, M]
        seen = float(cut.visible.sum())
        rows = [candidate.whole_table(cut).expand(1, *mass.shape)[0] for candidate in self.candidates]
        tables = torch.stack(rows)  # [candidates, H, MQ, M]
        layer = heard.layer
        self.costs[layer] = self.costs.get(layer, 0) + tables.sum((2, 3)) / seen
        self.caught[layer] = self.caught.get(layer, 0) + (tables * mass).sum((2, 3))
        self.texts[layer] = self.texts.get(layer, 0) + 1

    def found(self) -> tuple[tuple[dict[str, Any], ...], ...]:
        """Return the pattern of every head, by layer, as a policy writes it."""
        return tuple(tuple(self._of_head(layer, head) for head in range(self.costs[layer].shape[1]))
                     for layer in sorted(self.costs))  # fmt: skip

    def _of_head(self, layer: int, head: int) -> dict[str, Any]:
        cost = (self.costs[layer][:, head] / self.texts[layer]).tolist()
        caught = self.caught[layer][:, head].tolist()
        numbers = range(len(self.candidates))
        fits = [number for number in numbers if cost[number] <= self.keep]
        if fits:
            best = max(fits, key=lambda number: (caught[number], -cost[number]))
        else:  # A row's own blocks alone are more.
            best = min(numbers, key=lambda number: (cost[number], -caught[number]))
        return written_out(self.candidates[best])
