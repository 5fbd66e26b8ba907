"""What the sparse attention of a layer remembers of blocks, from call to call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.pages import Touched, all_pages, touched_pages
from tokcc.passes.cache.runs import run_from, run_of
from tokcc.passes.cache.storage import CacheStorage, Left
from tokcc.passes.cache.visible import slot_rank
from tokcc.passes.sparse.plan import PlannedSparse, sized
from tokcc.passes.sparse.turning import Turn

__all__ = ["with_new_tokens", "with_what_stays"]


def with_new_tokens(
    b: Builder,
    planned: PlannedSparse,
    storage: CacheStorage,
    held: Mapping[str, Any],
    call: tuple[Any, Any, Any, Any, Any, Any],
    turn: Turn | None = None,
) -> dict[str, Any]:
    """Return what is remembered when the tokens of a call have come in.

    Args:
        b: The builder.
        planned: The sparse attention.
        storage: How the cache is held.
        held: What was remembered, by name.
        call: Keys, those of the call, real slots, P, S and L, as for :func:`touched_pages`.
        turn: What turns keys, where the score reads them as they were before.
    """
    made = {}
    for size in planned.sizes:
        pages = touched_pages(b, planned.block_k * size, *call)
        if turn is not None:
            places = b.call(torch.ops.aten.clamp_min.default, slot_rank(b, call[2]), 0)
            pages = replace(pages, turns=turn, places=places)
        for name, fresh in _rows(b, planned, size, pages).items():
            made[name] = storage.paged_rows(b, held[name], pages, fresh)
    return made


def with_what_stays(b: Builder, planned: PlannedSparse, left: Left) -> dict[str, Any]:
    """Return what is remembered when a call with several tokens has moved entries: every block is summed up anew.

    For calls with one token nothing moves, and what they brought is there already.

    Args:
        b: The builder.
        planned: The sparse attention.
        left: What stays after the call, and what is remembered with its tokens.
    """
    assert left.cut is not None
    stays = b.size(left.key, 2)
    # Padding goes first: what is left of it is what the last slots had.
    real = run_from(b, left.real, 1, b.sub_sizes(left.cut.total, stays), stays)
    made = {}
    for size in planned.sizes:
        pages = all_pages(b, planned.block_k * size, left.key, real)
        for name, fresh in _rows(b, planned, size, pages).items():
            appended = run_of(b, left.pages[name], 2, 0, pages.count)
            made[name] = b.call(torch.ops.tokcc.choose_by_size.default, fresh, appended, [left.new], [0], [1])
    return made


def _rows(b: Builder, planned: PlannedSparse, size: int, pages: Touched) -> dict[str, Any]:
    """Return the rows of blocks of one size, by the names under which they travel."""
    assert planned.score is not None
    rows = planned.score.remembered(b, planned.layer, pages)
    return {sized(name, size): row for name, row in rows.items()}
