"""Which layers attend sparsely, when and to what."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tokcc.analysis.rotation import Rotation
from tokcc.passes.budget import Count
from tokcc.passes.cache.pages import PageState
from tokcc.passes.sparse.piece import SparseScore, SparseSelector

__all__ = ["PlannedSparse", "sized"]

_ANY = 2**62


@dataclass(frozen=True)
class PlannedSparse:
    """The sparse attention of one layer.

    Attributes:
        step: Index of the policy's step.
        layer: 0-based.
        name: Preset or node kind, for labels.
        where: Place in the policy.
        new: Least and largest number of tokens of the calls that it is for.
        least: Tokens that such a call sees at least; with fewer it attends to all of them.
        block_q: Queries in a block.
        block_k: Keys in a block.
        budget: Key blocks that a block of queries reads, or the most of them.
        score: Rates them; None where the selector wants no rating.
        select: Chooses them.
        rotations: How queries and keys are turned, where the score wants to know.
    """

    step: int
    layer: int
    name: str
    where: str
    new: tuple[int, int]
    least: int
    block_q: int
    block_k: int
    budget: Count
    score: SparseScore | None
    select: SparseSelector
    rotations: tuple[Rotation, Rotation] | None = None

    @property
    def bounds(self) -> tuple[list[int], list[int]]:
        """What new and seen tokens of its calls lie between, for ``choose_by_size``."""
        return [self.new[0], self.least], [self.new[1], _ANY]

    @property
    def single(self) -> bool:
        """Whether its calls have one token."""
        return self.new[1] == 1

    @property
    def orders(self) -> bool:
        """Whether tokens of a text enter the cache in another order."""
        return self.score is not None and self.score.orders

    @property
    def sizes(self) -> tuple[int, ...]:
        """Blocks that are rated: how many of the step's are in one."""
        return () if self.score is None else (1, *self.select.larger)

    def states(self, kv_heads: int, width: int, dtype: torch.dtype) -> tuple[PageState, ...]:
        """Return what its score remembers of blocks of a layer with such keys, of every size."""
        return tuple(
            replace(state, name=sized(state.name, size))
            for size in self.sizes
            for state in (() if self.score is None else self.score.states(kv_heads, width, dtype, self.block_k * size))
        )


def sized(name: str, size: int) -> str:
    """Return the name of what is remembered of blocks that are so many times as large."""
    return name if size == 1 else f"{name}_{size}"
