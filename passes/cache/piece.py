"""The three kinds of cache pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from tokcc.passes.budget import Count
from tokcc.passes.cache.cut import CacheCut, Retained
from tokcc.passes.cache.storage import Front
from tokcc.passes.piece import Piece

__all__ = ["CacheReducer", "CacheScore", "CacheSelector", "ReducedCache"]


class CacheScore(Piece):
    """Rates cache entries.

    Attributes:
        states: Names of what is carried from call to call, fp32 ``[B, Hkv, slots]`` each. They begin with `key`:
            runtimes carry only what looks like a key or a value.
        once: Rates the prompt only: later single tokens are appended and nothing is evicted for them.
        keeps_sinks: The first tokens win by their score and need no protection.
        by_key_norm: Rates by the length of keys, which says nothing where the model normalises them.
        looks_ahead: Turns queries to positions that are not their own: reads ``unturned`` and ``turned`` of the cut.
        reads_beside: Rates with tokens that a caller gives beside the call's, too: reads ``wide`` of the cut.
    """

    states: ClassVar[tuple[str, ...]] = ()
    once: ClassVar[bool] = False
    keeps_sinks: ClassVar[bool] = True
    by_key_norm: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    reads_beside: ClassVar[bool] = False

    def held(self) -> int:
        """Return how many entries, beside protected sinks, may have to stay until they can be rated."""
        return 0

    def emit(self, cut: CacheCut) -> Any:
        """Return fp32 ``[B, Hkv, L]``, or ``[B, 1, L]`` for one set in all heads; larger = more important."""
        raise NotImplementedError


class CacheSelector(Piece):
    """Chooses which entries stay.

    Attributes:
        sinks: Protected first tokens; a budget `kv: {sinks: ...}` overrides it.
        recent: Protected last tokens, or the share of the capacity that they are; likewise.
        by_layer: One budget gives layers different capacities.
        weighted: Says how many tokens each entry stands for.
    """

    wants_score: ClassVar[bool] = True
    by_layer: ClassVar[bool] = False
    weighted: ClassVar[bool] = False

    sinks: int = Field(default=0, ge=0)
    recent: int | float = Field(default=0, ge=0)

    def protected_recent(self, capacity: int | None) -> int:
        """Return the protected last tokens for a capacity.

        Raises:
            ValueError: A share of a capacity that is not a fixed number.
        """
        if isinstance(self.recent, int):
            return self.recent
        if capacity is None:
            raise ValueError("`select.recent` is a share, and the capacity grows with the sequence")
        return round(self.recent * capacity)

    def capacity(self, cut: CacheCut, planned: Count) -> Any:
        """Return how many slots stay, for a budget: a share counts the tokens of the sequence so far."""
        return planned.kept(cut.b, cut.total if planned.kind == "tokens" else cut.seen, cut.seen)

    def select(self, cut: CacheCut, score: Any) -> Retained:
        """Return what stays."""
        raise NotImplementedError


@dataclass(frozen=True)
class ReducedCache:
    """The smaller cache of a layer.

    Attributes:
        key: ``[B, Hkv, K, D]``.
        value: ``[B, Hkv, K, Dv]``.
        weight: fp32 ``[B, Hkv, K]`` from reducers with `weighted`; None = what the selection says.
        front: The entry in front of them, from reducers with `fronted`.
    """

    key: Any
    value: Any
    weight: Any = None
    front: Front | None = None


class CacheReducer(Piece):
    """Makes the smaller cache.

    Attributes:
        changes: Entries are not what they were: they cannot be held in a form that is made once.
        weighted: Says how many tokens each entry stands for.
        fronted: There is an entry before all others, which is the reducer's alone: no score and no selector sees it,
            and the reducer finds it in the first slot of its cut. Without weight at first.
    """

    changes: ClassVar[bool] = False
    weighted: ClassVar[bool] = False
    fronted: ClassVar[bool] = False

    def reduce(self, cut: CacheCut, retained: Retained) -> ReducedCache:
        """Return what is left; the selection counts slots behind the front."""
        raise NotImplementedError
