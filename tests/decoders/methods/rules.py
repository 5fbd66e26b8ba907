"""What rules share: selections as the papers state them, in plain loops and sorts."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best"]


def best(scores: Tensor, capacity: int, *, sinks: int = 0, recent: int = 0) -> Tensor | None:
    """Keep sinks, recent entries and the best others of ``[Hkv, L]``, ascending; ties to the older entry."""
    heads, total = scores.shape
    if total <= capacity:
        return None
    kept = []
    for head in range(heads):
        always = {j for j in range(total) if j < sinks or j >= total - recent}
        others = sorted((j for j in range(total) if j not in always), key=lambda j: (-float(scores[head, j]), j))
        kept.append(sorted(always | set(others[: capacity - len(always)])))
    return torch.tensor(kept)
