"""What the sparse attention of a layer remembers of blocks, from call to call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.pages import WHOLE, Asked, PageState, Touched, all_pages, touched_pages
from tokcc.passes.cache.runs import run_from, run_of
from tokcc.passes.cache.storage import CacheForm, CacheStorage, Left
from tokcc.passes.cache.visible import places_in_text
from tokcc.passes.sparse.piece import SparseScore, SparseSelector
from tokcc.passes.sparse.plan import PlannedSparse, sized
from tokcc.passes.sparse.turning import Turn

__all__ = ["Entering", "held_whole", "with_new_tokens", "with_what_stays"]


@dataclass(frozen=True)
class Entering:
    """The tokens of a call, as they come into a cache.

    Attributes:
        key: All keys ``[B, Hkv, N, D]``, N at least L.
        new_key: Those of the call ``[B, Hkv, S, D]``.
        real: bool ``[B, L]``: slots that are not padding.
        past: P.
        new: S.
        total: L.
        ids: The call's own tokens, int64 ``[B, S]``; None = the model takes something else.
        bias: What the model itself adds to the logits of the call's own keys, ``[B, Hkv, S]``; None = nothing.
        query: The call's queries ``[B, H, S, D]``; None where nobody wants them.
        index: What the layer's indexer compares the call's own keys by, ``[B, 1, S, W]``; None = there is none.
    """

    key: Any
    new_key: Any
    real: Any
    past: Any
    new: Any
    total: Any
    ids: Any = None
    bias: Any = None
    query: Any = None
    index: Any = None

    def pages(self, b: Builder, every: int, turn: Turn | None, reach: int = 0) -> Touched:
        """Return the pages in which they lie, and those of so many tokens in front of them.

        Args:
            b: The builder.
            every: Tokens of a page.
            turn: What turns keys, where somebody reads them as they were before; None = nobody.
            reach: How many tokens in front.
        """
        found = touched_pages(b, every, self.key, self.new_key, self.real, self.past, self.new, self.total, reach)
        found = replace(found, ids=self.ids, bias=self.bias, index=self.index)
        if turn is None:
            return found
        return replace(found, turns=turn, places=places_in_text(b, self.real))

    def asked(self, b: Builder) -> Asked:
        """Return their queries, and what else is known of the call."""
        own = run_from(b, self.real, 1, self.past, self.new)
        everyone, mine = (b.sum(b.cast(x, torch.float32), 1, keepdim=True) for x in (self.real, own))
        return Asked(self.query, own, b.sub(everyone, mine), self.past, self.new)


def with_new_tokens(
    b: Builder,
    planned: PlannedSparse,
    form: CacheForm,
    storage: CacheStorage,
    held: Mapping[str, Any],
    entering: Entering,
    turn: Turn | None = None,
) -> dict[str, Any]:
    """Return what one step remembers when the tokens of a call have come in.

    Args:
        b: The builder.
        planned: The step.
        form: What the cache holds.
        storage: How it is held.
        held: What was remembered, by name.
        entering: The tokens.
        turn: What turns keys, where the score reads them as they were before.
    """
    made = {}
    for piece, size, states in _remembering(planned, form):
        (every,) = {state.every for state in states} - {WHOLE}
        whole = {sized(state.name, size) for state in states if state.every == WHOLE}
        pages = entering.pages(b, every, turn, max(state.reach for state in states))
        if piece.goes_on:
            before = {
                state.name: storage.held_rows(b, held[sized(state.name, size)], pages)
                for state in states
                if state.every != WHOLE
            }
            before |= held_whole(b, planned, form, storage, held)
            pages = replace(pages, asked=entering.asked(b), held=before)
        for name, fresh in _rows(b, planned, piece, size, pages).items():
            made[name] = fresh if name in whole else storage.paged_rows(b, held[name], pages, fresh)
    return made


def held_whole(
    b: Builder, planned: PlannedSparse, form: CacheForm, storage: CacheStorage, held: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what one step remembered of the whole text before a call, by name; arguments as for the above."""
    return {
        state.name: storage.held_whole(b, held[state.name])
        for _, size, states in _remembering(planned, form)
        for state in states
        if state.every == WHOLE and size == 1
    }


def with_what_stays(b: Builder, planned: PlannedSparse, form: CacheForm, left: Left) -> dict[str, Any]:
    """Return what one step remembers when a call with several tokens has moved entries: all blocks are summed up anew.

    For calls with one token nothing moves, and what they brought is there already.

    Args:
        b: The builder.
        planned: The step.
        form: What the cache holds.
        left: What stays after the call, and what is remembered with its tokens.
    """
    assert left.cut is not None
    stays = b.size(left.key, 2)
    # Padding goes first: what is left of it is what the last slots had.
    real = run_from(b, left.real, 1, b.sub_sizes(left.cut.total, stays), stays)
    made = {}
    for piece, size, states in _remembering(planned, form):
        pages = all_pages(b, states[0].every, left.key, real)
        for name, fresh in _rows(b, planned, piece, size, pages).items():
            appended = run_of(b, left.pages[name], 2, 0, pages.count)
            made[name] = b.call(torch.ops.tokcc.choose_by_size.default, fresh, appended, [left.new], [0], [1])
    return made


def _remembering(
    planned: PlannedSparse, form: CacheForm
) -> Iterator[tuple[SparseScore | SparseSelector, int, tuple[PageState, ...]]]:
    """Yield the pieces of a step that remember something, the size of their blocks in the step's, and what it is."""
    for piece, size in planned.remembering:
        states = piece.states(form.kv_heads, form.key_width, form.dtype, planned.block_k * size)
        if states:
            yield piece, size, states


def _rows(
    b: Builder, planned: PlannedSparse, piece: SparseScore | SparseSelector, size: int, pages: Touched
) -> dict[str, Any]:
    """Return the rows of blocks of one size, by the names under which they travel."""
    return {sized(name, size): row for name, row in piece.remembered(b, planned.layer, pages).items()}
