"""How small the estimated ratios may be that each head of sparse attention leaves out."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tokcc.analysis.head_numbers import Heard
from tokcc.passes.sparse.scores.estimated_ratio import EstimatedRatio
from tokcc.passes.sparse.selectors.threshold import Threshold
from tokcc.pipeline.heard_cut import cut_of

__all__ = ["ThresholdSearch"]

FIRST, LEAST = 0.008, 1e-4
"""The largest threshold that is tried; what would be below the least is 0, and the head reads everything."""
ERROR = 0.4
"""Sum of absolute differences of a head's output that a query may cost."""
SINKS, NEAR = 1, 4
"""Blocks of keys that are read in any case, as the preset has them: the first, and those in front of a row."""


@dataclass
class ThresholdSearch:
    """Hears the attention of a decoder on texts and remembers what every threshold would have cost.

    SALE (arXiv:2505.24179) begins with 0.008 and halves a head's threshold until its output differs from the dense one
    by less than 0.4 for each query, as a sum over the channels. Here that is so on average over the texts.

    Attributes:
        block: Queries in a block; half as many keys are read together.
        errors: By layer, ``[thresholds, H]``, summed over the queries.
        queries: By layer, how many those were.
    """

    block: int
    errors: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, int] = field(default_factory=dict)

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """What is tried, the largest first."""
        tried = [FIRST]
        while tried[-1] / 2 >= LEAST:
            tried.append(tried[-1] / 2)
        return tuple(tried)

    def hear(self, heard: Heard) -> None:
        """Take in the attention of one layer on one text."""
        block_k = max(self.block // 2, 1)
        cut = cut_of(heard, self.block, block_k)
        select = Threshold(above=0.0, sinks=SINKS, local=NEAR)
        rating = select.rated(cut, EstimatedRatio(sinks=SINKS, local=NEAR).emit(cut))[0]  # [H, MQ, M]
        group = len(heard.query) // len(heard.key)
        found = torch.zeros(len(self.thresholds), len(heard.query))
        length = heard.query.shape[1]
        for head, probs in enumerate(heard.probs):
            value = heard.value[head // group].float()
            whole = probs @ value
            for number, threshold in enumerate(self.thresholds):
                table = rating[head] > threshold
                read = table.repeat_interleave(self.block, 0)[:length].repeat_interleave(block_k, 1)[:, :length]
                kept = probs * read
                less = kept @ value / kept.sum(1, keepdim=True).clamp(min=1e-30)
                found[number, head] = (less - whole).abs().sum()
        layer = heard.layer
        self.errors[layer] = self.errors.get(layer, torch.zeros_like(found)) + found
        self.queries[layer] = self.queries.get(layer, 0) + length

    def found(self) -> tuple[tuple[float, ...], ...]:
        """Return the threshold of every head, by layer."""
        rows = []
        for layer in sorted(self.errors):
            fits = self.errors[layer] < ERROR * self.queries[layer]  # [thresholds, H]
            rows.append(tuple(
                next((self.thresholds[number] for number, fit in enumerate(own) if fit), 0.0) for own in fits.T.tolist()
            ))  # fmt: skip
        return tuple(rows)
