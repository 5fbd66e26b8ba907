"""Key heads by number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from tokcc.passes.cache.head_choice import HeadChoice

__all__ = ["Listed"]


class Listed(HeadChoice):
    """The key heads that the policy names.

    Attributes:
        heads: Key heads from 0 by layer.
    """

    kind: ClassVar[str] = "listed"

    heads: dict[int, tuple[int, ...]] = Field(min_length=1)

    def choose(self, kv_heads: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
        """See :class:`Listed`."""
        for layer, heads in self.heads.items():
            if layer not in kv_heads:
                raise ValueError(f"the model has no layer {layer} whose cache grows")
            wrong = [head for head in heads if not 0 <= head < kv_heads[layer]]
            if wrong:
                raise ValueError(f"layer {layer} has key heads 0 to {kv_heads[layer] - 1}, not {wrong[0]}")
        return {layer: tuple(sorted(set(heads))) for layer, heads in self.heads.items() if heads}
