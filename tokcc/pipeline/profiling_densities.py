"""How evenly each layer of a decoder rates the blocks of a text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch

from tokcc.analysis.head_numbers import Heard
from tokcc.ir.builder import EagerBuilder
from tokcc.passes.budget import Count
from tokcc.passes.cache.storage import CacheForm
from tokcc.passes.cache.storages.merged import Merged
from tokcc.passes.sparse.plan import PlannedSparse
from tokcc.passes.sparse.remembering import Entering, with_new_tokens
from tokcc.passes.sparse.scores.probe_cosine import ProbeCosine
from tokcc.passes.sparse.selectors.fetched import Fetched
from tokcc.pipeline.heard_cut import cut_of

__all__ = ["DensitySums"]

QUERIES = 32
"""Queries of a text that are asked, evenly over its second half."""
REPRESENTATIVES, NEAR = 4, 512
"""As the preset has them, in long texts."""


@dataclass
class DensitySums:
    """Hears the attention of a decoder on texts and remembers how much its layers tell blocks apart.

    The density of a layer is the entropy of the softmax over its blocks' ratings, cosines of single queries and
    representatives, by its largest possible value (ActQKV, arXiv:2502.13542): 1 = all blocks are alike, and much has to
    be read. Queries of the second half of a text are asked, about the blocks of the first.

    Attributes:
        block: Queries in a block of the other methods that are measured; half as many keys are read together, in short
            texts an eighth of the text.
        sums: By layer, over the queries of all texts.
        queries: By layer, how many those were.
    """

    block: int
    sums: dict[int, float] = field(default_factory=dict)
    queries: dict[int, int] = field(default_factory=dict)

    def hear(self, heard: Heard) -> None:
        """Take in the attention of one layer on one text."""
        heads, length, width = heard.query.shape
        half = length // 2
        block = max(min(self.block // 2, half // 4), 2)
        cut = cut_of(heard, 1, block)
        score = ProbeCosine(representatives=min(REPRESENTATIVES, block), near=min(NEAR, half))
        score = score.fitted({"query_heads": heads, "heads": cut.kv_heads})
        everything = Count("share", Fraction(1))
        planned = PlannedSparse(0, heard.layer, "", "", (0, 1), 0, 1, block, everything, score, Fetched())
        pages = planned.states(cut.kv_heads, width, cut.key.dtype)
        form = CacheForm(cut.kv_heads, width, heard.value.shape[2], cut.key.dtype, pages=pages)
        held = {page.name: torch.zeros(1, page.heads, 0, page.width) for page in pages}
        entering = Entering(cut.key, cut.key, cut.real, 0, length, length, query=cut.query)
        states = with_new_tokens(EagerBuilder(), planned, form, Merged(), held, entering)
        rows = torch.linspace(half, length - 1, min(QUERIES, length - half)).round().long()
        asked = replace(cut, query=cut.query[:, :, rows], states=states)
        rating = score.emit(asked)[0, 0, :, : half // block].double()
        shares = torch.log_softmax(rating, 1)
        density = -(shares.exp() * shares).sum(1) / math.log(half // block)
        self.sums[heard.layer] = self.sums.get(heard.layer, 0.0) + float(density.sum())
        self.queries[heard.layer] = self.queries.get(heard.layer, 0) + len(rows)

    def found(self) -> tuple[float, ...]:
        """Return the mean of each layer."""
        return tuple(self.sums[layer] / self.queries[layer] for layer in sorted(self.sums))
