"""Tokens by a few channels of their keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator

from tokcc.errors import PlanError
from tokcc.ir.builder import Builder
from tokcc.passes.cache.pages import PageState, Touched
from tokcc.passes.cache.profile import given_or_read
from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.piece import SparseScore

__all__ = ["LabelProducts"]

_LABELS = "key_labels"
Entry = int | tuple[int, ...]
Channels = tuple[tuple[tuple[Entry, ...], ...], ...]


class LabelProducts(SparseScore):
    """Double Sparsity (arXiv:2408.07092, 3.2): the products of queries and keys in the channels that matter most.

    Which those are is measured beforehand: a table has for each layer and head channels, the most important first, or
    pairs of channels that one frequency turns (FASA, arXiv:2602.03152). What is remembered of a token is its key in
    those channels: ``[B, Hkv, tokens, width]``, or as many for every query head.

    Attributes:
        profile: A file with the table ``key_channels`` or ``query_channels``, of pairs ``key_pairs`` or
            ``query_pairs``, see `tokcc profile`.
        of: Whose channels: the key heads', or each query head's own, which remembers as often as much.
        units: What the file's table is of.
        count: Channels, or pairs of them.
        channels: The table itself, where there is no file: numbers of channels, or lists of those that go together.
    """

    kind: ClassVar[str] = "label_products"

    profile: str | None = None
    of: Literal["key", "query"] = "key"
    units: Literal["channels", "pairs"] = "channels"
    count: int = Field(default=16, ge=1)
    channels: Channels = Field(default=(), validate_default=True)

    @field_validator("channels", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        units = info.data.get("units")
        missing = f"no {units} are given: name a `profile`, a file that `tokcc profile MODEL -o FILE` writes"
        table = given_or_read(value, info.data.get("profile"), f"{info.data.get('of')}_{units}", missing)
        count = info.data.get("count", 0)
        return [[list(row)[:count] for row in layer] for layer in table]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        short = min((len(row) for layer in self.channels for row in layer), default=0)
        if short < self.count:
            raise ValueError(f"heads have {short} {self.units} in the table, and {self.count} are wanted")
        together = {"channels": 1, "pairs": 2}[self.units]
        if any(len(tuple(_each([entry]))) != together for layer in self.channels for row in layer for entry in row):
            raise ValueError(f"heads have {self.units} in the table, each of {together}")
        rows = [row for layer in self._rows for row in layer]
        if any(len(set(row)) < len(row) or min(row) < 0 for row in rows):
            raise ValueError("a head's channels are numbers from 0 on, each once")
        return self

    @cached_property
    def _rows(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The channels of each layer and head, those that go together beside each other."""
        return tuple(tuple(tuple(_each(row)) for row in layer) for layer in self.channels)

    def check(self, block_q: int, block_k: int) -> None:
        """See :class:`SparseScore`."""
        if (block_q, block_k) != (1, 1):
            raise ValueError(f"single queries and keys, not blocks of {block_q} and {block_k}")

    def states(self, kv_heads: int, width: int, dtype: torch.dtype, block: int) -> tuple[PageState, ...]:
        """See :class:`SparseScore`."""
        heads = len(self.channels[0])
        if self.of == "key" and heads != kv_heads:
            raise PlanError(
                f"`{self.kind}` has channels of {heads} key heads",
                needed=str(kv_heads),
                help="measure the channels on this model: `tokcc profile MODEL -o FILE`",
            )
        return (PageState(_LABELS, heads, len(self._rows[0][0]), block, dtype),)

    def check_heads(self, layer: int, heads: int) -> None:
        """See :class:`SparseScore`."""
        found = len(self.channels[layer]) if layer < len(self.channels) else 0
        if not found or heads % found or (self.of == "query" and heads != found):
            raise ValueError(f"channels for the heads of layer {layer}, of which the table has {found}")

    def remembered(self, b: Builder, layer: int, pages: Touched) -> Mapping[str, Any]:
        """See :class:`SparseScore`."""
        key = b.squeeze(pages.key, 3)  # [B, Hkv, R, D]
        kv_heads, heads = int(b.shape(key)[1]), len(self.channels[layer])
        if heads != kv_heads:
            own = torch.arange(heads) // (heads // kv_heads)
            key = b.call(torch.ops.aten.index_select.default, key, 1, b.constant("label_heads", own))
        return {_LABELS: self._taken(b, layer, key, 1)}

    def emit(self, cut: SparseCut) -> Any:
        """See :class:`SparseScore`."""
        b, labels = cut.b, cut.states[_LABELS]
        heads = len(self.channels[cut.layer])
        query = self._taken(b, cut.layer, cut.query, cut.heads // heads)  # [B, H, MQ, width]
        if heads == cut.kv_heads:
            return cut.of_blocks(cut.products(query, labels))
        made = b.cast(b.matmul(query, b.transpose(labels, 2, 3)), torch.float32)
        return cut.of_blocks(made)

    def _taken(self, b: Builder, layer: int, x: Any, group: int) -> Any:
        """Take each head's channels of ``[B, heads, R, D]``: a product with ones and zeros."""
        width, rows = int(b.shape(x)[3]), torch.tensor(self._rows[layer])
        if int(rows.max()) >= width:
            raise ValueError(f"channel {int(rows.max())} of layer {layer}, whose keys have {width}")
        chosen = torch.nn.functional.one_hot(rows, width).transpose(1, 2)  # [heads, D, width]
        table = b.constant(f"label_channels_{layer}", chosen.repeat_interleave(group, 0).to(b.dtype(x)))
        return b.matmul(x, b.unsqueeze(table, 0))


def _each(row: Sequence[Entry]) -> Iterator[int]:
    """Return the channels of a head one by one."""
    for entry in row:
        yield from (entry,) if isinstance(entry, int) else entry
