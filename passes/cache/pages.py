"""What is remembered of pages of tokens, beside their keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.runs import run_from

__all__ = ["WHOLE", "Asked", "PageState", "Touched", "all_pages", "touched_pages"]

aten = torch.ops.aten

WHOLE = 0
"""The tokens of a page that is the whole text."""


@dataclass(frozen=True)
class PageState:
    """A tensor ``[B, heads, pages, width]`` with a row for every page of a cache.

    Attributes:
        name: Begins with ``key_``: runtimes carry nothing else.
        heads: Rows of one page.
        width: Numbers in a row.
        every: Tokens of a page; 1 = every token has a row. Pages are counted from the first slot. `WHOLE` = one row
            for the whole text.
        dtype: Its type.
        reach: Tokens behind one that still change the row of its page.
    """

    name: str
    heads: int
    width: int
    every: int
    dtype: torch.dtype
    reach: int = 0

    def rows(self, slots: int) -> int:
        """Return how many pages there are of so many slots."""
        return 1 if self.every == WHOLE else -(-slots // self.every)


@dataclass(frozen=True)
class Asked:
    """The queries of a call, for what is remembered of them or of what they attend to.

    Attributes:
        query: ``[B, H, S, D]``, turned where the model turns them; None = nobody wants them.
        real: bool ``[B, S]``: those that are no padding.
        seen: Tokens in front of the call, padding not counted, fp32 ``[B, 1]``.
        past: P: slots in front of the call.
        new: S.
    """

    query: Any
    real: Any
    seen: Any
    past: Any
    new: Any


@dataclass(frozen=True)
class Touched:
    """The pages in which the tokens of a call lie: R of them, all others are as they were.

    Attributes:
        first: Number of the first of them.
        count: R.
        key: ``[B, Hkv, R, every, D]``: all their keys, also those that were there; any behind the last.
        real: bool ``[B, R, every]``: which of them are there, and no padding.
        slot: int64 ``[R, every]``: their slots; any where there is none.
        full: bool ``[R]``: pages whose last slot is filled.
        turns: For what is remembered of keys before their positions turned them, what turns keys
            ``[B, Hkv, N, D]`` to positions int64 ``[B, N]``; None = nobody wants it.
        places: The places of all slots in their samples, int64 ``[B, L]``; None likewise.
        ids: The call's own tokens, int64 ``[B, S]``; None = the model takes something else.
        bias: What the model itself adds to the logits of the call's own keys, ``[B, Hkv, S]``; None = nothing.
        index: What the layer's indexer compares the call's own keys by, ``[B, 1, S, W]``; None = there is no indexer.
        asked: The call's queries, and what else is known of the call.
        held: For pieces that go on from there, what the rows were before the call, by name, ``[B, heads, R, width]``:
            any numbers for pages that did not exist; for the whole text one row, any numbers before the first call.
    """

    first: Any
    count: Any
    key: Any
    real: Any
    slot: Any
    full: Any
    turns: Any = None
    places: Any = None
    ids: Any = None
    bias: Any = None
    index: Any = None
    asked: Asked | None = None
    held: Mapping[str, Any] = field(default_factory=dict)


def all_pages(b: Builder, every: int, key: Any, real: Any) -> Touched:
    """Return all pages of a cache.

    Args:
        b: The builder.
        every: Tokens of a page.
        key: ``[B, Hkv, K, D]``.
        real: bool ``[B, K]``: slots that are not padding.
    """
    total = b.size(key, 2)
    return touched_pages(b, every, key, key, real, 0, total, total)


def touched_pages(
    b: Builder, every: int, key: Any, new_key: Any, real: Any, past: Any, new: Any, total: Any, reach: int = 0
) -> Touched:
    """Return the pages in which the tokens of a call lie, and those of so many tokens in front of them.

    Args:
        b: The builder.
        every: Tokens of a page.
        key: All keys ``[B, Hkv, N, D]``, N at least L.
        new_key: Those of the call ``[B, Hkv, S, D]``.
        real: bool ``[B, L]``: slots that are not padding.
        past: P.
        new: S.
        total: L.
        reach: How many tokens in front.
    """
    if every == 1 and not reach:
        fresh = run_from(b, real, 1, past, new)
        own = b.call(aten.add.Scalar, b.arange(new, key), past)
        full = b.compare("ge", own, 0)
        return Touched(past, new, b.unsqueeze(new_key, 3), b.unsqueeze(fresh, 2), b.unsqueeze(own, 1), full)
    start = b.max_sizes(b.sub_sizes(past, reach), 0) if reach else past
    first = b.floordiv_sizes(start, every)
    count = b.sub_sizes(b.floordiv_sizes(b.add_sizes(total, every - 1), every), first)
    page = b.call(aten.add.Scalar, b.arange(count, key), first)
    slot = b.add(b.unsqueeze(b.mul(page, every), 1), b.unsqueeze(b.arange(every, key), 0))  # [R, every]
    there = b.call(aten.lt.Scalar, slot, total)
    slot = b.where(there, slot, 0)
    return Touched(
        first,
        count,
        b.call(aten.index.Tensor, key, [None, None, slot]),
        b.logical_and(b.call(aten.index.Tensor, real, [None, slot]), there),
        slot,
        b.call(aten.select.int, there, 1, -1),
    )
