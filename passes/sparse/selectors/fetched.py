"""Blocks that are read beside those that always are, as many as a layer is worth."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator

from tokcc.errors import PlanError
from tokcc.passes.budget import Count
from tokcc.passes.cache.profile import read_profile
from tokcc.passes.sparse.cut import BlockList, SparseCut
from tokcc.passes.sparse.piece import SparseSelector
from tokcc.passes.sparse.ranking import first_of, most_of, ranked

__all__ = ["Fetched"]


class Fetched(SparseSelector):
    """The best blocks beside those that must be read, which come on top: the budget says how many are fetched.

    With a number for each layer, layers share out the budget (ActQKV, arXiv:2502.13542): one layer after the other gets
    of what is left the part that its number is of those that are left, rounded (halves to even), at least ``least`` and
    at most ``most`` times the budget.

    Attributes:
        profile: A file with those numbers, ``densities`` in what ``tokcc profile`` writes.
        densities: The numbers themselves, one for each layer of the model; none and no file = layers are alike.
        least: Blocks that a layer fetches at least.
        most: How much more than the budget a layer fetches at most.
    """

    kind: ClassVar[str] = "fetched"
    fills: ClassVar[bool] = True

    profile: str | None = None
    densities: tuple[float, ...] = Field(default=(), validate_default=True)
    least: int = Field(default=1, ge=1)
    most: float = Field(default=2.0, ge=1)

    @field_validator("densities", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        path = info.data.get("profile")
        if value and path:
            raise ValueError("densities are given, and a profile as well")
        return read_profile(path, "densities") if path else value

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if not all(0 < density < float("inf") for density in self.densities):
            raise ValueError("densities are positive numbers")
        return self

    def check_layers(self, layers: tuple[int, ...]) -> None:
        """See :class:`SparseSelector`."""
        if self.densities and layers[-1] >= len(self.densities):
            raise ValueError(f"densities for layers up to {layers[-1]}, not only for {len(self.densities)} layers")

    def shares(self, mean: int) -> list[int]:
        """Return how many blocks each layer of the model fetches, ``mean`` on average where the bounds allow."""
        left, made = mean * len(self.densities), []
        for layer, density in enumerate(self.densities):
            own = round(left * density / sum(self.densities[layer:]))
            own = min(max(own, self.least), int(self.most * mean))
            made.append(own)
            left -= own
        return made

    def select(self, cut: SparseCut, score: Any, budget: Count) -> BlockList:
        """See :class:`SparseSelector`."""
        b = cut.b
        budget = self._of_layer(cut, budget)
        most, own = most_of(cut, budget)
        always = b.sum(b.cast(self.forced(cut), torch.int64), 3, keepdim=True)  # [B or 1, 1, MQ, 1]
        # Own blocks are one more than the queries fill, which may begin anywhere.
        room = self.sinks + (self.local + 1 + -(-cut.block_q // cut.block_k) if self.own else 0)
        values, places = ranked(cut, self.rated(cut, score), b.min_sizes(b.add_sizes(most, room), cut.blocks))
        wanted = b.call(torch.ops.aten.add.Scalar, always, most) if own is None else b.add(always, own)
        return first_of(cut, values, places, wanted)

    def _of_layer(self, cut: SparseCut, budget: Count) -> Count:
        if not self.densities:
            return budget
        if budget.kind != "tokens":
            raise PlanError(
                "densities of layers share out a fixed number of blocks",
                needed="`budget: {tokens: ...}`",
                help="give a number of tokens instead of a share, or leave the profile out",
            )
        return Count("tokens", Fraction(self.shares(int(budget.amount))[cut.layer]))
