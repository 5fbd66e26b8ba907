"""Old cache entries that stand for tokens which are not computed anew: what engines take, and how keys are turned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tokcc.analysis.rotation import Rotation
from tokcc.passes.inputs import EngineInput

__all__ = ["OLD", "OLD_PLACES", "RefillPlan", "old_name"]

OLD, OLD_PLACES = "old_key_values.", "old_position_ids"
"""What the names of inputs with old entries begin with, and the name of the one with their positions."""


def old_name(layer: int, part: str) -> str:
    """Return the name of the input with the old keys or values of a layer."""
    return f"{OLD}{layer}.{part}"


@dataclass(frozen=True)
class RefillPlan:
    """What is given.

    Attributes:
        places: The input with the positions at which old keys were turned.
        entries: By layer and part, the input with old entries.
        turns: By layer, how it turns its keys.
    """

    places: EngineInput
    entries: Mapping[tuple[int, str], EngineInput]
    turns: Mapping[int, Rotation]

    def random(self, tokens: int, seed: int) -> dict[str, torch.Tensor]:
        """Return old entries for a first call of one row, all its tokens but a question: values mean nothing."""
        generator = torch.Generator().manual_seed(seed)
        sizes = {"B": 1, "R": tokens - max(tokens // 16, 1)}
        made = {self.places.name: torch.arange(sizes["R"])[None]}
        for spec in self.entries.values():
            shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
            made[spec.name] = torch.randn(shape, generator=generator).to(spec.dtype)
        return made

    @property
    def inputs(self) -> tuple[EngineInput, ...]:
        """All of it."""
        return (self.places, *self.entries.values())
