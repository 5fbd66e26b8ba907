"""Which layers attend sparsely, when and to what."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tokcc.analysis.rotation import Rotation
from tokcc.passes.budget import Count
from tokcc.passes.cache.pages import PageState
from tokcc.passes.sparse.piece import SparseScore, SparseSelector

__all__ = ["MODEL", "PlannedSparse", "sized"]

MODEL = -1
"""The step of what no policy says: the model itself chooses so."""

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
        then: What other calls of the layer do, of another number of tokens; None = they attend to everything.
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
    then: PlannedSparse | None = None

    @property
    def each(self) -> tuple[PlannedSparse, ...]:
        """What the calls of the layer do, this and the other one."""
        return (self,) if self.then is None else (self, *self.then.each)

    @property
    def pieces(self) -> tuple[SparseScore | SparseSelector, ...]:
        """What works in these calls."""
        return (self.select,) if self.score is None else (self.score, self.select)

    def beside(self, other: PlannedSparse) -> bool:
        """Whether no call is one for both."""
        return all(one.new[1] < other.new[0] or other.new[1] < one.new[0] for one in self.each)

    @property
    def bounds(self) -> tuple[list[int], list[int]]:
        """What new and seen tokens of its calls lie between, for ``choose_by_size``."""
        return [self.new[0], self.least], [self.new[1], _ANY]

    @property
    def single(self) -> bool:
        """Whether its calls have one token."""
        return self.new[1] == 1

    @property
    def ordering(self) -> PlannedSparse | None:
        """What lets the tokens of a text enter the cache in another order; None = nothing."""
        return next((one for one in self.each if one.score is not None and one.score.orders), None)

    @property
    def remembering(self) -> tuple[tuple[SparseScore | SparseSelector, int], ...]:
        """What may remember something of blocks in these calls, and how many of the step's blocks are one to it."""
        sizes = (1, *self.select.larger)
        return tuple((piece, size) for piece in self.pieces for size in (sizes if piece is self.score else (1,)))

    @property
    def reads_calls(self) -> bool:
        """Whether something is made of what only the call knows in which a token comes."""
        return any(piece.wants_ids or piece.wants_bias or piece.goes_on or piece.wants_index for piece in self.pieces)

    def states(self, kv_heads: int, width: int, dtype: torch.dtype) -> tuple[PageState, ...]:
        """Return what the pieces remember of blocks of a layer with such keys, of every size."""
        made = (
            replace(state, name=sized(state.name, size))
            for one in self.each
            for piece, size in one.remembering
            for state in piece.states(kv_heads, width, dtype, one.block_k * size)
        )
        return tuple(dict.fromkeys(made))


def sized(name: str, size: int) -> str:
    """Return the name of what is remembered of blocks that are so many times as large."""
    return name if size == 1 else f"{name}_{size}"
