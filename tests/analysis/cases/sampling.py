"""Sampling images at places that tokens say."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.analysis.oracle import Case, Side

__all__ = ["CASES"]

aten = torch.ops.aten


def _sampled(x: Tensor, image: Tensor) -> tuple[Tensor, ...]:
    """Places ``[B, N, 4, 2]`` of one image for each sample, and of one for each of two heads."""
    batch, tokens, _ = x.shape
    grid = x.tanh().reshape(batch, tokens, 4, 2)
    heads = x.tanh().reshape(batch, tokens, 2, 2, 2).transpose(1, 2).reshape(batch * 2, tokens, 2, 2)
    return (
        aten.grid_sampler.default(image, grid, 0, 0, False),
        aten.grid_sampler.default(image.reshape(batch * 2, 3, 5, 4), heads, 0, 1, True),
    )


CASES = [
    Case(
        "grid sampler",
        _sampled,
        ("b 6 n 4", "(b h) 3 n 2"),
        sides={"image": Side("b 6 5 4")},
        dynamic=True,
    ),
]
