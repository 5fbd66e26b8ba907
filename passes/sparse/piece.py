"""The two kinds of sparse pieces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from tokcc.ir.builder import Builder
from tokcc.passes.budget import Count
from tokcc.passes.cache.pages import PageState, Touched
from tokcc.passes.piece import Piece, other_piece
from tokcc.passes.sparse.compressed import TokenSets
from tokcc.passes.sparse.cut import FORCED, HIDDEN, BlockList, Share, SparseCut

__all__ = ["OtherSparseScore", "OtherSparseSelector", "SparseScore", "SparseSelector"]


class _SparsePiece(Piece):
    """What both have.

    What a piece would have to compute of every block in every call it may remember: a row of numbers for each, which
    travels with the cache and of which a call makes those anew in whose blocks its tokens lie.
    """

    wants_ids: ClassVar[bool] = False
    """True when it reads which tokens a call brings."""
    wants_bias: ClassVar[bool] = False
    """True when it reads what the model itself adds to the logits of keys."""
    wants_queries: ClassVar[bool] = False
    """True when what it remembers is made of the queries of a call, too."""
    wants_index: ClassVar[bool] = False
    """True when it reads what the model's own indexer compares tokens by."""
    goes_on: ClassVar[bool] = False
    """True when what it remembers is made of what it remembered."""

    def fitted(self, sizes: Mapping[str, int]) -> Self:
        """Return the piece as a model of certain sizes needs it.

        Args:
            sizes: ``query_heads``, ``heads``, ``head_width``, ``layers``; ``index_width`` where there is an indexer.
        """
        del sizes
        return self

    def check(self, block_q: int, block_k: int) -> None:
        """Refuse blocks that cannot be rated.

        Raises:
            ValueError: Says what is needed.
        """

    def check_heads(self, layer: int, heads: int) -> None:
        """Refuse a layer with so many query heads.

        Raises:
            ValueError: Says what is needed.
        """

    def states(self, kv_heads: int, width: int, dtype: torch.dtype, block: int) -> tuple[PageState, ...]:
        """Return what it remembers of a layer.

        Args:
            kv_heads: Key heads.
            width: Of keys.
            dtype: Of keys.
            block: Keys in a block.
        """
        del kv_heads, width, dtype, block
        return ()

    def remembered(self, b: Builder, layer: int, pages: Touched) -> Mapping[str, Any]:
        """Return the rows of some blocks by name, each ``[B, heads, R, width]``; padding counts nothing.

        Args:
            b: The builder.
            layer: 0-based.
            pages: The blocks.
        """
        raise NotImplementedError


class SparseScore(_SparsePiece):
    """Rates key blocks for rows of queries."""

    for_single: ClassVar[bool] = False
    """True when it rates for one query at a time."""
    unturned: ClassVar[bool] = False
    """True when it reads queries and keys as they are before their positions turn them."""

    def check(self, block_q: int, block_k: int) -> None:
        """Refuse blocks that cannot be rated: several queries, where it rates for one at a time.

        Raises:
            ValueError: Says what is needed.
        """
        del block_k
        if self.for_single and block_q != 1:
            raise ValueError(f"one query at a time, not blocks of {block_q}")

    @property
    def bias_state(self) -> str | None:
        """The state that holds the model's own bias of keys, which then needs not be computed anew; None = none."""
        return None

    @property
    def orders(self) -> bool:
        """Whether it wants the tokens of a text to enter the cache in an order of its own; only for single tokens."""
        return False

    def order(self, b: Builder, key: Any, free: Any, block: int) -> Any:
        """Return that order, int64 ``[B, Hkv, S]``.

        Args:
            b: The builder.
            key: The keys of a call ``[B, Hkv, S, D]``.
            free: bool ``[B, S]``: one run of tokens, which fills whole blocks; all others stay where they are.
            block: Keys in a block.
        """
        raise NotImplementedError

    def emit(self, cut: SparseCut) -> Any:
        """Return fp32 ``[B, H, MQ, M]``, or 1 or the key heads for H, or 1 for MQ; larger = more important."""
        raise NotImplementedError


class SparseSelector(_SparsePiece):
    """Chooses the key blocks that rows of queries read.

    Attributes:
        share: Who has a list of its own: ``each`` query head, the key head of a group (``group_max``, ``group_mean`` of
            their ratings), or the whole layer (``all_mean``).
        sinks: First blocks of a sample that are always read.
        local: Blocks in front of a row's own that are always read.
        own: Whether a row's own blocks are always read, too. Of several queries some would see nothing otherwise.
    """

    wants_score: ClassVar[bool] = True
    budgeted: ClassVar[bool] = True
    """False when the selector knows itself how much is read."""
    fills: ClassVar[bool] = False
    """True when it reads as much as the budget allows, whatever the ratings."""
    compresses: ClassVar[bool] = False
    """True when it chooses tokens that take part in the attention, and no blocks that queries read."""
    attends: ClassVar[bool] = False
    """True when it writes the attention out itself, because its weights are no softmax over what is read."""
    passes_on: ClassVar[bool] = False
    """Layers read what was chosen in another one: entry by entry their caches are the same."""

    share: Share = "each"
    sinks: int = Field(default=0, ge=0)
    local: int = Field(default=0, ge=0)
    own: bool = True

    @model_validator(mode="after")
    def _own_and_local(self) -> Self:
        if self.local and not self.own:
            raise ValueError("`local` blocks lie in front of a row's own, which are not read with `own: false`")
        return self

    def check_rows(self, block_q: int) -> None:
        """Refuse rows of queries of which some might see nothing.

        Raises:
            ValueError: Says what is needed.
        """
        if not self.own and block_q != 1:
            raise ValueError(f"single queries for `own: false`, not blocks of {block_q}")

    @property
    def larger(self) -> tuple[int, ...]:
        """Sizes of the larger blocks that it wants ratings of, too: how many of the step's are in one."""
        return ()

    def rates(self, layer: int) -> bool:
        """Whether it chooses by a rating in a layer."""
        del layer
        return self.wants_score

    def reads_all(self, layer: int) -> bool:
        """Whether a layer reads everything, and what is chosen in it is for those behind it."""
        del layer
        return False

    def check_layers(self, layers: tuple[int, ...]) -> None:
        """Refuse layers of a step, ascending.

        Raises:
            ValueError: Says what is needed.
        """

    def rated(self, cut: SparseCut, score: Any) -> Any:
        """Return the ratings of those who have a list, ``[B, Hs, MQ, M]``: what must be read wins, the rest loses.

        Where more must be read than the budget allows, the newest blocks are: of equal ones runtimes choose others.
        """
        return self.over(cut, cut.shared(score, self.share))

    def over(self, cut: SparseCut, rating: Any) -> Any:
        """Return ratings ``[B, Hs, MQ, M]`` over which wins what must be read; the rest of what is not seen loses."""
        b = cut.b
        if not self.own and not self.sinks:
            return b.where(cut.visible, rating, HIDDEN)
        place = b.cast(b.add(b.arange(cut.blocks, cut.key), 1), torch.float32)  # [M]
        must = b.mul(place, FORCED)
        return b.where(self.forced(cut), must, b.where(cut.visible, rating, HIDDEN))

    def forced(self, cut: SparseCut) -> Any:
        """Return bool ``[B or 1, 1, MQ, M]``: what is read in any case."""
        if self.own:
            return cut.edges(self.sinks, self.local)
        return cut.b.logical_and(cut.sinks(self.sinks), cut.visible)

    def tokens(self, cut: SparseCut, score: Any, budget: Count) -> TokenSets:
        """Return what takes part, where that is what the selector chooses; arguments as for :meth:`select`."""
        raise NotImplementedError

    def attended(self, cut: SparseCut, score: Any, budget: Count) -> Any:
        """Return what the queries attend to, ``[B, H, S, Dv]``, where the selector does that; arguments as above."""
        raise NotImplementedError

    def select(self, cut: SparseCut, score: Any, budget: Count) -> BlockList:
        """Return what is read.

        Args:
            cut: The call.
            score: What the score gave; None where none is wanted.
            budget: Blocks that a row reads, or the most of them.
        """
        raise NotImplementedError


OtherSparseScore = Annotated[SparseScore, other_piece(SparseScore, "sparse.scores")]
"""A parameter of a piece that is a score of its own."""

OtherSparseSelector = Annotated[SparseSelector, other_piece(SparseSelector, "sparse.selectors")]
"""A parameter of a selector that is another one."""
