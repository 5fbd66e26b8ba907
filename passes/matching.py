"""What matchings share: how many pairs they make, and how padded batches are put in order."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.passes.cut import Cut, Matched
from tokcc.passes.ordering import topk

__all__ = ["interleaved", "matched_per_sample", "pairs", "pairs_per_sample"]

aten = torch.ops.aten

_PADDING, _SOURCE = 2**23, 2**23 + 1
"""Places behind every token that stays: padding, and last the tokens that are merged away.

Below 2**24: OpenVINO was seen to mix up the order of greater integers, as if it sorted them as fp32.
"""


def pairs(cut: Cut) -> Any:
    """Return how many pairs the budget asks for, at most half of the candidates."""
    b, n = cut.b, cut.candidates
    removed = b.sub_sizes(n, cut.count.kept(b, n, cut.initial_candidates))
    return b.min_sizes(removed, b.floordiv_sizes(n, 2))


def pairs_per_sample(cut: Cut) -> Any:
    """Return the same for each sample of a padded batch, int64 ``[B, 1]``."""
    b = cut.b
    real = cut.valid_count()
    initial = cut.initial_valid_count() if cut.count.of_initial else real
    removed = b.sub(real, cut.count.kept_per_sample(b, real, initial))
    half = b.call(aten.div.Tensor_mode, real, 2, rounding_mode="floor")
    return b.unsqueeze(b.call(aten.minimum.default, removed, half), 1)


def interleaved(cut: Cut, index: Any, values: Any) -> Any:
    """Write ``values`` ``[B, M]`` at the tokens ``index`` ``[B, M]`` of a row of zeros, int64 ``[B, N]``."""
    b = cut.b
    empty = b.full([cut.batch.size, cut.tokens], 0, torch.int64, cut.x)
    return b.scatter(empty, 1, index, b.cast(values, torch.int64))


def matched_per_sample(
    cut: Cut, *, place: Any, merging: Any, to: Any, size: Any, in_order: bool = False, most: Any = None
) -> Matched:
    """Make the matching of a padded batch, in which every sample merges as many pairs as it would alone.

    Samples may merge fewer tokens than there are sources in the static shape. Tokens are sorted so that those that stay
    come first, in the order that the sample has alone, then padding, then those that are merged away: the first
    ``size`` are the output, and what is missing among the sources is padding, which weighs nothing.

    Args:
        cut: The cut, with padding, or with as many pairs as a sample has that pass a threshold.
        place: int64 ``[N]`` or ``[B, N]`` below 2**23: output order of the tokens that stay.
        merging: int64 ``[B, N]``: 1 for the tokens that are merged away.
        to: int64 ``[B, N]``: the token that each of them joins.
        size: K, enough for the tokens that stay in every sample.
        in_order: The output order follows the sequence.
        most: The most tokens that a sample merges away, where that can be more than ``N - size``.
    """
    b = cut.b
    dtype = b.dtype(cut.x)
    gone = b.compare("gt", merging, 0)
    stays = b.logical_and(cut.present(), b.logical_not(gone))
    key = b.where(stays, place, b.cast(b.where(gone, _SOURCE, _PADDING), torch.int64))
    order = topk(b, b.mul(key, -1), cut.tokens, in_order=False)  # [B, N] ascending by key
    position = b.scatter(order, 1, order, cut.per_sample(cut.positions()))  # inverse
    keep = b.slice(order, 1, 0, size)
    source = b.slice(order, 1, size if most is None else b.sub_sizes(cut.tokens, most), None)
    slot = b.gather(position, 1, b.gather(to, 1, source))
    if most is None:
        slot = b.mul(slot, b.gather(merging, 1, source))  # padding goes to slot 0, where it adds nothing
    else:
        nowhere = b.add(b.call(aten.zeros_like.default, slot), size)
        slot = b.where(b.gather(gone, 1, source), slot, nowhere)
    weight = b.cast(cut.present(), dtype)
    if cut.space.weight is not None:
        weight = b.mul(b.cast(cut.space.weight, dtype), weight)
    return Matched(
        keep=keep,
        source=source,
        slot=slot,
        first=0,
        size=size,
        valid=b.gather(stays, 1, keep),
        weight=weight,
        ascending=in_order,
        partial=most is not None,
    )
