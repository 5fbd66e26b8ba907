"""Every block that is rated high enough."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator

from tokcc.passes.budget import Count
from tokcc.passes.cache.profile import read_profile
from tokcc.passes.sparse.cut import BlockList, SparseCut
from tokcc.passes.sparse.piece import SparseSelector
from tokcc.passes.sparse.ranking import first_of, most_of, ranked

__all__ = ["Threshold"]

aten = torch.ops.aten


class Threshold(SparseSelector):
    """The blocks whose rating is above a number, and those that must be read; the budget is the most of them.

    Attributes:
        above: The number.
        profile: A file with a number for each query head instead, ``thresholds`` in what ``tokcc profile`` writes with
            a text.
        heads: Those numbers where there is no file: a row for each layer of the model, an entry for each query head.
    """

    kind: ClassVar[str] = "threshold"

    above: float
    profile: str | None = None
    heads: tuple[tuple[float, ...], ...] = Field(default=(), validate_default=True)

    @field_validator("heads", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        path = info.data.get("profile")
        if value and path:
            raise ValueError("thresholds are given, and a profile as well")
        return read_profile(path, "thresholds") if path else value

    @model_validator(mode="after")
    def _alone(self) -> Threshold:
        if self.heads and self.share != "each":
            raise ValueError(f"thresholds of single query heads, which share no list: leave `share: {self.share}` out")
        return self

    def check_heads(self, layer: int, heads: int) -> None:
        """See :class:`SparseSelector`."""
        found = len(self.heads[layer]) if layer < len(self.heads) else 0
        if self.heads and found != heads:
            raise ValueError(f"thresholds for {heads} query heads in layer {layer}, not {found}")

    def limit(self, b: Any, layer: int) -> Any:
        """Return what ratings ``[B, Hs, MQ, M]`` of a layer must be above."""
        if not self.heads:
            return self.above
        return b.constant(f"thresholds_{layer}", torch.tensor(self.heads[layer]).reshape(1, -1, 1, 1))

    def select(self, cut: SparseCut, score: Any, budget: Count) -> BlockList:
        """See :class:`SparseSelector`."""
        b = cut.b
        most, own = most_of(cut, budget)
        values, places = ranked(cut, self.rated(cut, score), most)
        above = b.compare("gt", values, self.limit(b, cut.layer))
        wanted = b.sum(b.cast(above, torch.int64), 3, keepdim=True)
        return first_of(cut, values, places, wanted if own is None else b.call(aten.minimum.default, wanted, own))
