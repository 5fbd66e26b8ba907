"""A pattern for each head."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator

from tokcc.passes.cache.profile import read_profile
from tokcc.passes.sparse.cut import SparseCut
from tokcc.passes.sparse.pattern import SparsePattern
from tokcc.passes.sparse.piece import OtherSparseSelector

__all__ = ["ByHead"]

aten = torch.ops.aten


class ByHead(SparsePattern):
    """What every query head reads by a pattern that was found for it before (MInference, arXiv:2407.02490).

    Heads of one layer with the same pattern are looked at together.

    Attributes:
        profile: A file with the patterns, ``patterns`` in what ``tokcc profile`` writes with a text.
        heads: The patterns themselves where there is no file: a row for each layer of the model, an entry for each
            query head.
        otherwise: The pattern of all heads where neither is given; then lists may be shared.
    """

    kind: ClassVar[str] = "by_head"

    profile: str | None = None
    heads: tuple[tuple[OtherSparseSelector, ...], ...] = Field(default=(), validate_default=True)
    otherwise: OtherSparseSelector

    @field_validator("heads", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        path = info.data.get("profile")
        if value and path:
            raise ValueError("patterns are given, and a profile as well")
        return read_profile(path, "patterns") if path else value

    @model_validator(mode="after")
    def _patterns(self) -> ByHead:
        for piece in (self.otherwise, *(piece for row in self.heads for piece in row)):
            if not isinstance(piece, SparsePattern) or isinstance(piece, ByHead):
                raise ValueError(f"`{piece.kind}` is no pattern: it wants a score or a budget of the step")  # noqa: TRY004
            if piece.share != "each" and (self.heads or piece is not self.otherwise):
                raise ValueError(f"`{piece.kind}` is for single heads here: leave `share: {piece.share}` out")
        return self

    def check(self, block_q: int, block_k: int) -> None:
        """See :class:`SparseSelector`."""
        for piece in (self.otherwise, *(piece for row in self.heads for piece in row)):
            piece.check(block_q, block_k)

    def check_heads(self, layer: int, heads: int) -> None:
        """See :class:`SparseSelector`."""
        if not self.heads:
            return
        if layer >= len(self.heads):
            raise ValueError(f"patterns for layer {layer}, and not only for {len(self.heads)} layers")
        if len(self.heads[layer]) != heads:
            raise ValueError(f"patterns for {heads} query heads in layer {layer}, not {len(self.heads[layer])}")

    def table(self, cut: SparseCut) -> Any:
        """See :class:`SparsePattern`."""
        b = cut.b
        own = self.heads[cut.layer] if self.heads else (self.otherwise,) * cut.heads
        kinds = list(dict.fromkeys(own))
        if len(kinds) == 1:
            return kinds[0].whole_table(cut)  # type: ignore[attr-defined]  # a pattern, as was checked
        batch, tables, order = b.size(cut.query, 0), [], []
        for kind in kinds:
            heads = [head for head, piece in enumerate(own) if piece == kind]
            made = kind.whole_table(cut.of_heads(heads))  # type: ignore[attr-defined]
            tables.append(b.expand(made, [batch, len(heads), cut.rows, cut.blocks]))
            order += heads
        back = torch.tensor([order.index(head) for head in range(cut.heads)])
        return b.call(aten.index_select.default, b.cat(tables, 1), 1, b.constant(f"pattern_order_{cut.layer}", back))
