"""A stream with fewer rows than the prompt has tokens, several tokens reading one row: what engines take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from tokcc.analysis.rotation import Rotation
from tokcc.passes.inputs import EngineInput

__all__ = ["TOKEN_ASSIGN", "UnmergePlan"]

TOKEN_ASSIGN = EngineInput(
    "token_assign",
    ("B", "S"),
    "for each token of the call the row of the embeddings that it reads; -1 = the row that stands as far from the end",
    torch.int64,
    unguided=-1,
    low=-1,
    high=-1,
)
"""Encoders that merge tell the same of their own tokens, under this name."""


@dataclass(frozen=True)
class UnmergePlan:
    """Rows stand for several tokens outside of attention, which runs over the tokens.

    Attributes:
        tokens: Placeholders that hold a row each for what the stream begins with.
        turns: By layer, how queries and keys are turned by position.
    """

    tokens: tuple[str, ...]
    turns: Mapping[int, tuple[Rotation, Rotation]]

    def reads(self, layer: int) -> list[fx.Node]:
        """Return what queries and keys of a layer are made of."""
        return [node for turn in self.turns[layer] for node in (turn.source, turn.positions, *turn.outside)]

    def rows(self, tokens: int) -> int:
        """Return how many rows a prompt without padding has in :meth:`dressed`."""
        return sum(_parts(tokens)[0])

    def dressed(self, feeds: Mapping[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
        """Return fewer rows and a random map, for checks and timing: about a third of the middle of each prompt.

        Args:
            feeds: The inputs of a first call, with its mask.
            seed: Of the map.
        """
        mask = feeds["attention_mask"]
        generator = torch.Generator().manual_seed(seed)
        maps: list[torch.Tensor] = []
        for count in mask.sum(1).tolist():
            (front, groups, behind), middle = _parts(count)
            # Every row is read at least once.
            drawn = torch.randint(groups, (max(middle - groups, 0),), generator=generator)
            read = torch.cat([torch.arange(groups), drawn])[torch.randperm(middle, generator=generator)]
            last = torch.arange(behind) + front + groups
            maps.append(torch.cat([torch.arange(front), read + front, last]))
        rows = max(int(own.max()) + 1 for own in maps)
        assign = torch.zeros_like(mask, dtype=torch.int64)
        chosen = torch.zeros(len(maps), rows, dtype=torch.int64)
        for row, own in enumerate(maps):
            before = rows - int(own.max()) - 1
            places = mask[row].nonzero()[:, 0]
            assign[row, places] = own + before
            chosen[row, before:] = places[: rows - before]
        tokens = {name: feeds[name] for name in ("input_ids", "inputs_embeds") if name in feeds}
        batch = torch.arange(len(maps))[:, None]
        return {**{name: value[batch, chosen] for name, value in tokens.items()}, TOKEN_ASSIGN.name: assign}


def _parts(tokens: int) -> tuple[tuple[int, int, int], int]:
    """Return the rows of a prompt, in front of what is shared, of that and behind, and how many tokens share."""
    front, behind = tokens // 4, max(tokens // 8, 1)
    middle = tokens - front - behind
    return (front, max(middle // 3, 1), behind), middle
