"""What happens to the scans of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokcc.analysis.state_sites import StateSite
from tokcc.config import LoadedPolicy
from tokcc.passes.scan.piece import ScanReducer, ScanScore, ScanSelector

__all__ = ["PlannedFilter", "ScanPlan"]


_SHORT = 10
"""Tokens of a short prompt; rows with padding in front of it have fewer."""


@dataclass(frozen=True)
class PlannedFilter:
    """The filter of one layer's scan.

    Attributes:
        step: Index of the policy's step.
        layer: 0-based.
        name: Preset or node kind, for labels.
        where: Place in the policy.
        tokens: How long the texts are that are scanned whole.
        score: Rates tokens.
        select: Chooses them.
        reduce: Says what becomes of the others.
    """

    step: int
    layer: int
    name: str
    where: str
    tokens: int
    score: ScanScore
    select: ScanSelector
    reduce: ScanReducer


@dataclass(frozen=True)
class ScanPlan:
    """What will be done to the scans of a decoder.

    Attributes:
        policy: The policy it came from.
        sites: The scans, by layer.
        filters: In the order of layers, one for a layer at most.
        seen: Name of the input that says which tokens there were so far; None = the model takes none.
        last_token_outputs: Positions of the outputs that hold the last token's row only.
    """

    policy: LoadedPolicy
    sites: tuple[StateSite, ...]
    filters: tuple[PlannedFilter, ...] = ()
    seen: str | None = None
    last_token_outputs: tuple[int, ...] = ()

    @property
    def before(self) -> int:
        """How many tokens a text must have had for a short prompt to be filtered, in some rows of a batch."""
        return max((max(each.select.shortest(each.tokens) - _SHORT, 0) for each in self.filters), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Return the applied policy in the long form, with the layers that were chosen: replayable."""
        data = self.policy.policy.to_dict()
        for number, step in enumerate(data["steps"]):
            mine = [planned for planned in self.filters if planned.step == number]
            if mine:
                step["at"]["layers"] = [planned.layer for planned in mine]
        return data
