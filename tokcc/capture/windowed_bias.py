"""Attention that keeps the keys with the largest bias once there are more than so many: in one form for all lengths.

Models trained with Dynamic Mask Attention (Doge, arXiv:2508.02124) branch in Python on how many keys there are, which a
trace fixes to one side. Both sides are one computation: the best ``min(window, keys)`` of each row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["any_length"]

_METHOD = "prepare_dynamic_mask"


@contextlib.contextmanager
def any_length(model: nn.Module) -> Iterator[None]:
    """Let the masks of a model's attentions be made without a branch on the number of keys, while this is open."""
    changed = [module for module in model.modules() if hasattr(module, _METHOD)]
    for module in changed:
        setattr(module, _METHOD, _without_branch(getattr(module, _METHOD)))
    try:
        yield
    finally:
        for module in changed:
            delattr(module, _METHOD)  # the method of its class is seen again


def _without_branch(made: Any) -> Any:
    def masked(
        hidden_states: Tensor, dt_states: Tensor, keep_window_size: int = 2048, attention_mask: Tensor | None = None
    ) -> Tensor:
        mask: Tensor = made(hidden_states, dt_states, dt_states.shape[-1], attention_mask)  # nothing left out
        most = torch.sym_min(keep_window_size, mask.shape[-1])  # type: ignore[no-untyped-call]  # torch is partly typed
        best = torch.topk(mask, most, dim=-1, largest=True, sorted=False).indices
        kept = torch.zeros_like(mask, dtype=torch.bool).scatter(-1, best, True)
        return mask.masked_fill(~kept, torch.finfo(mask.dtype).min)

    return masked
