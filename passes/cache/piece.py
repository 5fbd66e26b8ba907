"""The three kinds of cache pieces."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from tokcc.passes.budget import Count
from tokcc.passes.cache.cut import CacheCut, Retained
from tokcc.passes.piece import Piece

__all__ = ["CacheReducer", "CacheScore", "CacheSelector"]


class CacheScore(Piece):
    """Rates cache entries.

    Attributes:
        states: Names of what is carried from call to call, fp32 ``[B, Hkv, slots]`` each. They begin with `key`:
            runtimes carry only what looks like a key or a value.
        once: Rates the prompt only: later single tokens are appended and nothing is evicted for them.
        keeps_sinks: The first tokens win by their score and need no protection.
        by_key_norm: Rates by the length of keys, which says nothing where the model normalises them.
    """

    states: ClassVar[tuple[str, ...]] = ()
    once: ClassVar[bool] = False
    keeps_sinks: ClassVar[bool] = True
    by_key_norm: ClassVar[bool] = False

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
    """

    wants_score: ClassVar[bool] = True
    by_layer: ClassVar[bool] = False

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


class CacheReducer(Piece):
    """Makes the smaller cache."""

    def reduce(self, cut: CacheCut, retained: Retained) -> tuple[Any, Any]:
        """Return keys ``[B, Hkv, K, D]`` and values ``[B, Hkv, K, Dv]``."""
        raise NotImplementedError
