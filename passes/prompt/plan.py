"""What happens to the prompt between two layers, or in front of the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from tokcc.analysis.decoder_cuts import DecoderCuts
from tokcc.passes.budget import Count
from tokcc.passes.inputs import EngineInput
from tokcc.passes.prompt.piece import PromptReducer, PromptScore, PromptSelector
from tokcc.passes.prompt.refill_plan import RefillPlan
from tokcc.passes.prompt.segments import Segment
from tokcc.passes.prompt.unmerge_plan import UnmergePlan

__all__ = ["PlannedPrune", "PromptPlan"]


@dataclass(frozen=True)
class PlannedPrune:
    """A reduction of the prompt at one cut.

    Attributes:
        step: Index of the policy's step.
        layer: 0-based: the cut is in this layer, behind it, or in front of it.
        name: Preset or node kind, for labels.
        where: Place in the policy.
        site: Which cut of the layer.
        cut: Name of the node.
        count: The budget.
        present: How many candidates a prompt has there; None = any number.
        removed: By how many tokens the prompt gets shorter; None = by a share of its length.
        added: How many tokens are put in the place of those that go.
        first: Protected first tokens.
        last: Protected last tokens, one at least.
        positions: Whether tokens keep their positions, or are counted anew.
        score: Rates candidates; None where the selector wants none.
        select: Chooses them.
        reduce: Makes the shorter stream.
    """

    step: int
    layer: int
    name: str
    where: str
    site: str
    cut: str
    count: Count
    present: int | None
    removed: int | None
    added: int
    first: int
    last: int
    positions: Literal["keep", "compact"]
    score: PromptScore | None
    select: PromptSelector
    reduce: PromptReducer

    @property
    def behind(self) -> int:
        """The last layer that sees all the tokens, -1 for none: the layers behind it see fewer."""
        return self.layer - (self.site == "block_input")

    @property
    def remaining(self) -> int | None:
        """How many candidates stay; None = unknown when compiling."""
        if self.present is None or self.removed is None:
            return None
        return self.present - self.removed - self.added


@dataclass(frozen=True)
class PromptPlan:
    """All reductions of the prompt.

    Attributes:
        prunes: In the order of execution.
        segments: What the candidates belong to; none = the whole prompt.
        cuts: The stream of the decoder.
        inputs: What engines take beside the model's own inputs.
        refill: Where old entries stand for the tokens that go, or None.
        unmerge: Where several tokens read one row of the stream, and attention runs over the tokens, or None.
    """

    prunes: tuple[PlannedPrune, ...]
    segments: tuple[Segment, ...]
    cuts: DecoderCuts
    inputs: tuple[EngineInput, ...] = ()
    refill: RefillPlan | None = None
    unmerge: UnmergePlan | None = None

    def stage(self, layer: int) -> int:
        """Return how many cuts lie in front of a layer's attention: layers of one stage see the same tokens."""
        return sum(prune.behind < layer for prune in self.prunes if not prune.reduce.refills)

    def refills(self, layer: int) -> bool:
        """Whether old entries stand for tokens that do not come to a layer."""
        return any(prune.behind < layer for prune in self.prunes if prune.reduce.refills)

    def gone(self, layer: int) -> int:
        """Return how many real tokens of every prompt never come to a layer, where padding stays."""
        return sum(prune.removed or 0 for prune in self.prunes if prune.behind < layer)

    @property
    def padding_first(self) -> bool:
        """Whether padding goes before anything else: the whole prompt is up for selection."""
        return not self.segments

    @property
    def needed(self) -> int:
        """How many tokens of the segments every prompt must have; 0 = any prompt will do."""
        if not self.segments:
            return 0
        present = [prune.present for prune in self.prunes if prune.present is not None]
        return max(present, default=sum(prune.removed or 0 for prune in self.prunes))

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt that can be reduced."""
        stops = [segment.stop for segment in self.segments if segment.stop is not None]
        tokens = [prune.first + prune.last for prune in self.prunes]
        return max([self.needed, *stops, *tokens], default=0) + 1

    def dressed(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the inputs of a first call that say which tokens belong to the segments, or which share a row.

        Args:
            feeds: The inputs of a call of at least :attr:`shortest` real tokens in every row, with its mask.
        """
        if self.unmerge is not None:
            return self.unmerge.dressed(feeds)
        mask = feeds["attention_mask"]
        place = mask.cumsum(1) - 1
        named = [segment for segment in self.segments if segment.start is None]
        if not named:
            return {}
        # Behind the first token where there is one.
        first = int(self.shortest < int(mask.sum(1).min()))
        own = (place >= first) & (place < first + self.needed) & (mask > 0)
        if "input_ids" not in feeds:
            return {s.mask_input: (own if s is named[0] else torch.zeros_like(own)).to(torch.int64) for s in named}
        ids = feeds["input_ids"].clone()
        tokens = [segment.token for segment in named if segment.token is not None]
        for token in tokens:
            ids[ids == token] = int(token == 0)
        ids[own] = tokens[0]
        return {"input_ids": ids}
