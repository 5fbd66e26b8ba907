"""Which slots of a cache hold tokens, told from the attention mask alone."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.ir.builder import Builder

__all__ = ["places_in_text", "real_slots", "slot_rank"]


def real_slots(
    b: Builder,
    attention_mask: Any,
    past: Any,
    new: Any,
    like: Any,
    *,
    call: Any = None,
    fresh: Any = None,
    gone: int = 0,
) -> Any:
    """Return bool ``[B, L]``: slots that are not padding.

    Padding stands in front of a row (left padding) and is evicted first, and kept entries stay in order: what is left
    of it is the first slots of every head. So the number of real tokens before this call says which slots are real,
    and the mask may be longer than the cache.

    Args:
        b: The builder.
        attention_mask: ``[B, T]`` with T of at least S, 1 = real; None = no padding.
        past: P.
        new: S.
        like: A tensor ``[B, ...]`` for batch and device.
        call: Tokens of the whole call, where the layer sees only S of them; None = S.
        fresh: bool ``[B, S]``: which of those are real; None = the mask says.
        gone: Real tokens of the first call that never came into this cache.
    """
    if attention_mask is None:
        return b.full([b.size(like, 0), b.add_sizes(past, new)], True, torch.bool, like)
    mask = b.cast(attention_mask, torch.int64)
    split = b.sub_sizes(b.size(attention_mask, 1), new if call is None else call)
    before = b.sum(b.slice(mask, 1, 0, split), 1, keepdim=True)  # [B, 1] real tokens of earlier calls
    if gone:
        before = b.sub(before, gone)
    if fresh is None:
        fresh = b.compare("gt", b.slice(mask, 1, split, None), 0)
    # Slot j of P is real when P - j <= before: the newest `before` slots.
    age = b.add(b.call(torch.ops.aten.flip.default, b.arange(past, like), [0]), 1)  # [P]: P, ..., 1
    known = b.compare("le", age, before)  # [B, P]
    return b.cat([known, fresh], 1)


def slot_rank(b: Builder, real: Any) -> Any:
    """Return the place of every slot among the real ones of its sample, int64 ``[B, L]``; padding in front has -1."""
    return b.sub(b.call(torch.ops.aten.cumsum.default, b.cast(real, torch.int64), 1), 1)


def places_in_text(b: Builder, real: Any) -> Any:
    """Return the same with 0 for padding, as positions that a model can be given."""
    return b.call(torch.ops.aten.clamp_min.default, slot_rank(b, real), 0)
