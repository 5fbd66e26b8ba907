"""Key heads by measured numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tokcc.passes.cache.head_choice import HeadChoice
from tokcc.passes.cache.profile import read_profile

__all__ = ["ByProfile"]

Table = tuple[tuple[float, ...], ...]


class ByProfile(HeadChoice):
    """The heads with the highest or the lowest numbers over all layers, or all others.

    A table has a row for each layer of the model and a number for each of its heads, key heads or query heads: a key
    head is chosen when any query head that reads it is. A share is rounded to a number of heads; of equal ones the
    earlier layer and head counts as the lower one (DuoAttention, arXiv:2410.10819). Layers with sliding windows count,
    and are left out.

    Attributes:
        profile: A file with the tables, see :mod:`tokcc.passes.cache.profile`.
        highest: Shares of heads by the table's name: a head among the highest of any table is chosen.
        lowest: The same for the lowest.
        tables: The tables themselves, by name, where there is no file.
        rest: Choose the heads that are not among those.
    """

    kind: ClassVar[str] = "by_profile"

    profile: str = ""
    highest: dict[str, float] = Field(default_factory=dict)
    lowest: dict[str, float] = Field(default_factory=dict)
    tables: dict[str, Table] = Field(default_factory=dict, validate_default=True)
    rest: bool = False

    @field_validator("highest", "lowest")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        wrong = [share for share in value.values() if not 0 <= share <= 1]
        if wrong:
            raise ValueError(f"{wrong[0]} is not a share between 0 and 1")
        return value

    @field_validator("tables", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        path = info.data.get("profile")
        if value and path:
            raise ValueError("tables are given, and a profile as well")
        names = {**info.data.get("highest", {}), **info.data.get("lowest", {})}
        return {name: read_profile(path, name) for name in names} if path else value

    @model_validator(mode="after")
    def _complete(self) -> ByProfile:
        if not self.highest and not self.lowest:
            raise ValueError("no shares are given: `highest: {table: 0.5}` or `lowest: ...`")
        missing = [name for name in (*self.highest, *self.lowest) if name not in self.tables]
        if missing:
            raise ValueError(f"no table `{missing[0]}` is given: name a `profile`, a file that has one")
        return self

    def choose(self, kv_heads: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
        """See :class:`ByProfile`."""
        found: set[tuple[int, int]] = set()
        for name, share in self.highest.items():
            every = self._sorted(name, kv_heads)
            found |= set(every[len(every) - round(share * len(every)) :])
        for name, share in self.lowest.items():
            every = self._sorted(name, kv_heads)
            found |= set(every[: round(share * len(every))])
        chosen = {}
        for layer, count in kv_heads.items():
            own = {head // (self._heads_of(layer) // count) for at, head in found if at == layer}
            heads = tuple(head for head in range(count) if (head in own) != self.rest)
            if heads:
                chosen[layer] = heads
        return chosen

    def _heads_of(self, layer: int) -> int:
        return len(next(iter(self.tables.values()))[layer])

    def _sorted(self, name: str, kv_heads: Mapping[int, int]) -> list[tuple[int, int]]:
        """Return the layers and heads of a table, lowest first."""
        table: Sequence[Sequence[float]] = self.tables[name]
        if not table or max(kv_heads) >= len(table):
            raise ValueError(f"the table `{name}` has {len(table)} layers, the model at least {max(kv_heads) + 1}")
        for layer, count in kv_heads.items():
            if not table[layer] or len(table[layer]) % count or len(table[layer]) != self._heads_of(layer):
                raise ValueError(
                    f"`{name}` has {len(table[layer])} heads in layer {layer}, the model {count} key heads"
                )
        every = sorted((number, layer, head) for layer, row in enumerate(table) for head, number in enumerate(row))
        return [(layer, head) for _, layer, head in every]
