"""What happens to the cache of each layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tokcc.analysis.cache_sites import CacheSite
from tokcc.analysis.rotation import Rotation
from tokcc.config import LoadedPolicy
from tokcc.passes.budget import Count
from tokcc.passes.cache.piece import CacheReducer, CacheScore, CacheSelector

__all__ = ["CachePlan", "PlannedEviction"]


@dataclass(frozen=True)
class PlannedEviction:
    """The eviction of one layer.

    Attributes:
        step: Index of the policy's step.
        layer: 0-based.
        name: Preset or node kind, for labels.
        where: Place in the policy.
        capacity: Slots that stay after a call.
        sinks: Protected first tokens.
        recent: Protected last tokens.
        score: Rates entries.
        select: Chooses them.
        reduce: Makes the smaller cache.
        rotations: For `positions: compact`, how the layer turns queries and keys: the cache then holds keys that are
            not turned, and every call turns them by their place in the cache.
    """

    step: int
    layer: int
    name: str
    where: str
    capacity: Count
    sinks: int
    recent: int
    score: CacheScore
    select: CacheSelector
    reduce: CacheReducer
    rotations: tuple[Rotation, Rotation] | None = None

    @property
    def length(self) -> tuple[Any, ...]:
        """What the length of the cache depends on: layers with equal ones have equally long caches."""
        return self.capacity, self.score.once, self.select.by_layer and (self.layer, self.select, self.recent)


@dataclass(frozen=True)
class CachePlan:
    """What will be done to the caches.

    Attributes:
        policy: The policy it came from.
        sites: The caches, by layer.
        windows: Sliding window of each layer, 0 = none.
        evictions: By layer.
        attention_mask: Name of the padding mask input, or None.
        warnings: What the report must say.
        last_token_outputs: Positions of the outputs that hold the last token's row only.
    """

    policy: LoadedPolicy
    sites: tuple[CacheSite, ...]
    windows: tuple[int, ...]
    evictions: dict[int, PlannedEviction] = field(default_factory=dict)
    attention_mask: str | None = None
    warnings: tuple[str, ...] = ()
    last_token_outputs: tuple[int, ...] = ()

    def without_evictions(self) -> CachePlan:
        """Return the plan that keeps everything that can still be seen."""
        return replace(self, evictions={}, warnings=())

    def to_dict(self) -> dict[str, Any]:
        """Return the applied policy in the long form, with the layers that were chosen: replayable."""
        data = self.policy.policy.to_dict()
        layers: dict[int, list[int]] = {}
        for layer, eviction in self.evictions.items():
            layers.setdefault(eviction.step, []).append(layer)
        for step, chosen in layers.items():
            data["steps"][step]["at"]["layers"] = sorted(chosen)
        return data
