"""Putting new tokens behind the candidates that stay."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.passes.prompt.cut import PromptCut, Remaining, Selected

__all__ = ["behind_candidates"]


def behind_candidates(cut: PromptCut, chosen: Selected, new: Any, stands_for: Any, count: Any) -> Remaining:
    """Return the kept tokens with new ones behind the place where the last candidate was.

    Args:
        cut: The cut.
        chosen: The kept tokens.
        new: ``[B, Q, C]``, with Q of at least ``count``.
        stands_for: int64 ``[B, Q]``: a pruned token for each.
        count: How many of them are real (a size): none in a call that is not the first one.
    """
    b = cut.b
    new, stands_for = b.slice(new, 1, 0, count), b.slice(stands_for, 1, 0, count)
    size = b.add_sizes(chosen.size, count)
    # Kept tokens have even places; what is new comes between the last candidate and the text behind it.
    old = b.mul(chosen.index, 2)
    place = b.add(b.mul(stands_for, 0), b.add(b.mul(cut.last_candidate(), 2), 1))
    place = b.cast(b.cat([old, place], 1), torch.float32)
    order = b.call(torch.ops.tokcc.topk_select.default, b.mul(place, -1.0), size, False)
    stream = b.cat([cut.rows_of(cut.x, chosen.index), new], 1)
    index = b.gather(b.cat([chosen.index, stands_for], 1), 1, order)
    return Remaining(cut.rows_of(stream, order), index, size, ascending=False)
