"""Finding deformable attention: every token looks at a few places of images that all tokens make."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcc.analysis.dominators import Stream

__all__ = ["SamplingSite", "sampling_sites"]

aten = torch.ops.aten
_MOST_STEPS = 10
_LAYOUT = {
    operator.getitem,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.split_with_sizes.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.clone.default,
    aten._to_copy.default,
    aten.masked_fill.Scalar,
    aten.mul.Tensor,
}
"""What stands between the values of tokens and an image of them: layout, and a mask."""


@dataclass(frozen=True)
class SamplingSite:
    """The sampling of one layer.

    Attributes:
        samplers: Names of its samplers, one for each image, in execution order: ``[B H, D, N, points]``.
        images: Names of what they sample from, ``[B H, D, h, w]``: values of all tokens.
    """

    samplers: tuple[str, ...]
    images: tuple[str, ...]

    @property
    def output(self) -> str:
        """The last sampler."""
        return self.samplers[-1]

    @property
    def mixes(self) -> str:
        """Name of the node where tokens have met."""
        return self.output


def sampling_sites(stream: Stream) -> list[SamplingSite]:
    """Return what is sampled between neighbouring points that everything passes, in execution order."""
    return [
        SamplingSite(tuple(node.name for node in group), tuple(str(node.args[0]) for node in group))
        for group in stream.groups(_of_tokens)
    ]


def _of_tokens(sampler: fx.Node) -> bool:
    """True for a sampler of a linear layer's output that was put into the form of an image."""
    if sampler.target is not aten.grid_sampler.default:
        return False
    node: Any = sampler.args[0]
    for _ in range(_MOST_STEPS):
        if not isinstance(node, fx.Node) or node.target not in _LAYOUT:
            return False
        node = node.args[0]
        if isinstance(node, fx.Node) and node.target is aten.linear.default:
            return True
    return False
