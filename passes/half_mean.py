"""Half of a token's channels beside what all tokens share of the other half."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.ir.builder import Builder

__all__ = ["half_mean"]


def half_mean(b: Builder, z: Any, among: Any, real: Any = None) -> Any:
    """Replace the second half of the channels by its mean over tokens (DynamicViT, arXiv:2106.02034, section 3.2).

    Args:
        b: The builder.
        z: fp32 ``[B, N, E]``.
        among: The tokens whose mean counts, ``[B, M, E]``.
        real: Which of them are real, bool ``[B, M]``; None = all.
    """
    half = b.shape(z)[2] // 2
    own, shared = b.slice(z, 2, 0, half), b.slice(among, 2, half, None)
    if real is None:
        mean = b.mean(shared, 1, keepdim=True)
    else:
        weight = b.unsqueeze(b.cast(real, torch.float32), 2)
        mean = b.div(b.sum(b.mul(shared, weight), 1, keepdim=True), b.clamp_min(b.sum(weight, 1, keepdim=True), 1.0))
    return b.cat([own, b.expand(mean, [b.size(z, 0), b.size(z, 1), -1])], 2)
