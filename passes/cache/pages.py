"""What is remembered of pages of tokens, beside their keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.runs import run_from

__all__ = ["PageState", "Touched", "touched_pages"]

aten = torch.ops.aten


@dataclass(frozen=True)
class PageState:
    """A tensor ``[B, heads, pages, width]`` with a row for every page of a cache.

    Attributes:
        name: Begins with ``key_``: runtimes carry nothing else.
        heads: Rows of one page.
        width: Numbers in a row.
        every: Tokens of a page; 1 = every token has a row. Pages are counted from the first slot.
        dtype: Its type.
    """

    name: str
    heads: int
    width: int
    every: int
    dtype: torch.dtype

    def rows(self, slots: int) -> int:
        """Return how many pages there are of so many slots."""
        return -(-slots // self.every)


@dataclass(frozen=True)
class Touched:
    """The pages in which the tokens of a call lie: R of them, all others are as they were.

    Attributes:
        first: Number of the first of them.
        count: R.
        key: ``[B, Hkv, R, every, D]``: all their keys, also those that were there; any behind the last.
        real: bool ``[B, R, every]``: which of them are there, and no padding.
    """

    first: Any
    count: Any
    key: Any
    real: Any


def touched_pages(
    b: Builder, every: int, key: Any, new_key: Any, real: Any, past: Any, new: Any, total: Any
) -> Touched:
    """Return the pages in which the tokens of a call lie.

    Args:
        b: The builder.
        every: Tokens of a page.
        key: All keys ``[B, Hkv, N, D]``, N at least L.
        new_key: Those of the call ``[B, Hkv, S, D]``.
        real: bool ``[B, L]``: slots that are not padding.
        past: P.
        new: S.
        total: L.
    """
    if every == 1:
        fresh = run_from(b, real, 1, past, new)
        return Touched(past, new, b.unsqueeze(new_key, 3), b.unsqueeze(fresh, 2))
    first = b.floordiv_sizes(past, every)
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
    )
