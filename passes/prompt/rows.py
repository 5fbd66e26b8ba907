"""Attention of many rows: those of the text, or those of the candidates themselves."""

from __future__ import annotations

from typing import Any, Literal

import torch

from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.prompt.cut import PromptCut

__all__ = ["Of", "candidate_rows", "probs_of_rows", "text_rows", "view_of"]

Of = Literal["own", "next"]
"""The attention of the layer in front of the cut, or of the one behind it as it would be if nothing went."""


def text_rows(cut: PromptCut) -> tuple[Any, Any]:
    """Return the tokens behind the last candidate.

    Returns:
        int64 ``[B, R]``, rows of all tokens that are no candidates, ascending; and fp32 ``[B, R]``: 1 for those behind
        the last candidate, 0 for those in front of it and for padding.
    """
    b = cut.b
    flags = b.cast(b.logical_not(cut.candidates), torch.float32)
    assert cut.present is not None
    rows = b.call(
        torch.ops.tokcc.topk_select.default, flags, _in_first_call(cut, b.sub_sizes(cut.tokens, cut.present)), True
    )
    behind = b.compare("gt", rows, cut.last_candidate())
    return rows, b.cast(b.logical_and(behind, b.gather(cut.real, 1, rows)), torch.float32)


def candidate_rows(cut: PromptCut) -> tuple[Any, Any]:
    """Return the candidates, int64 ``[B, R]``, ascending; and fp32 ``[B, R]``: 1 for each in the first call."""
    b = cut.b
    assert cut.present is not None
    flags = b.cast(cut.candidates, torch.float32)
    rows = b.call(torch.ops.tokcc.topk_select.default, flags, _in_first_call(cut, cut.present), True)
    return rows, b.gather(flags, 1, rows)


def _in_first_call(cut: PromptCut, count: Any) -> Any:
    """Return a number of rows, and 1 in other calls: nothing is dropped there, and one row costs nothing."""
    b = cut.b
    return b.add_sizes(b.mul_sizes(b.sub_sizes(count, 1), cut.first_call), 1)


def view_of(cut: PromptCut, of: Of, rows: Any) -> tuple[CacheCut, Any]:
    """Return an attention, and the queries of some rows of it, ``[B, H, R, D]``."""
    if of == "next":
        view = cut.probe(rows)
        return view, view.query
    view = cut.attention(cut.layer)
    return view, cut.rows_of(view.query, rows, 2)


def probs_of_rows(cut: PromptCut, of: Of, rows: Any) -> Any:
    """Return the probabilities of some rows, fp32 ``[B, H, R, N]``."""
    view, query = view_of(cut, of, rows)
    return cut.heads_of(cut.probs(view, query, rows))
