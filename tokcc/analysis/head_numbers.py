"""What single attention heads of a decoder do, in numbers: from their probabilities on texts that are made for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokcc.kernels.cached_attention.reference import probabilities

__all__ = ["Attended", "Heard", "copies", "cut_error", "heard_attention", "span_mass"]


@dataclass(frozen=True)
class Heard:
    """The attention of one layer; one row, no padding.

    Attributes:
        layer: 0-based.
        query: ``[H, S, D]``.
        key: ``[Hkv, S, D]``.
        value: ``[Hkv, S, Dv]``.
        window: Sliding window, 0 = none.
        scale: Factor of the logits.
        softcap: Cap of the logits, 0 = none.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    window: int
    scale: float
    softcap: float

    @cached_property
    def probs(self) -> Tensor:
        """fp32 ``[H, S, S]``."""
        real = torch.ones(1, self.key.shape[1], dtype=torch.bool)
        query, key = self.query[None], self.key[None]
        return probabilities(query, key, real, self.window, self.scale, self.softcap, None)[0].flatten(0, 1)


Attended = Callable[[Heard], None]


@contextmanager
def heard_attention(hear: Attended) -> Iterator[None]:
    """Let every ``cached_attention`` of a first call be heard, layer after layer."""
    with _Listening(hear):
        yield


class _Listening(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types there
    def __init__(self, hear: Attended) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor here
        self.hear, self.layer = hear, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.tokcc.cached_attention.default:
            # Nothing is evicted and nothing was held: keys are whole, and there are no weights.
            query, key, value, real, window, scale, softcap = args
            assert bool(real.all())
            self.hear(Heard(self.layer, query[0], key[0], value[0], window, scale, softcap))
            self.layer += 1
        return func(*args, **(kwargs or {}))


def copies(probs: Tensor, period: int) -> tuple[Tensor, Tensor]:
    """Return how much each head attends to earlier copies of the current token, and to what followed them.

    Args:
        probs: ``[H, S, S]`` on a text of ``period`` different tokens that repeats itself.
        period: Its length.

    Returns:
        Echo and induction scores ``[H]`` (RazorAttention, arXiv:2407.15891): means over all tokens but the first round.
    """
    heads, rows, _ = probs.shape
    echo, induction = torch.zeros(heads), torch.zeros(heads)
    for row in range(period, rows):
        earlier = torch.arange(row - period, -1, -period)
        echo += probs[:, row, earlier].sum(1)
        induction += probs[:, row, earlier + 1].sum(1)
    count = max(rows - period, 1)
    return echo / count, induction / count


def span_mass(probs: Tensor, queries: range, span: range) -> Tensor:
    """Return the mean attention of some queries to a span, ``[H]`` (CompressKV, arXiv:2508.02401)."""
    return probs[:, queries.start : queries.stop, span.start : span.stop].sum(2).mean(1)


def cut_error(probs: Tensor, value: Tensor, heads: Sequence[int], kept: int, window: int) -> float:
    """Return what a layer loses when only the entries that some heads look at are kept.

    The last ``window`` queries of the given query heads choose ``kept - window`` entries before them, the same for all
    heads; the error is the sum of absolute differences of what those queries attend, relative to its own size.

    Args:
        probs: ``[H, S, S]``.
        value: ``[Hkv, S, D]``.
        heads: Query heads that choose.
        kept: Entries that stay.
        window: The last queries.
    """
    rows = probs[:, -window:]  # [H, W, S]
    before = rows.shape[2] - window
    rating = rows[list(heads), :, :before].sum((0, 1))
    stays = torch.zeros(rows.shape[2], dtype=torch.bool)
    stays[before:] = True
    stays[rating.topk(min(kept - window, before)).indices] = True
    cut = rows * stays
    cut = cut / cut.sum(2, keepdim=True).clamp(min=1e-30)
    values = value.float().repeat_interleave(len(rows) // len(value), 0)
    whole = rows @ values
    return float((cut @ values - whole).abs().sum() / whole.abs().sum().clamp(min=1e-30))
