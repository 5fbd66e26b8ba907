"""The class token's attention, each head weighted by what it adds to the token."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from tokcc.passes.cut import Cut
from tokcc.passes.piece import Score
from tokcc.passes.scores.attention_rows import query_rows

__all__ = ["HeadWeightedRows"]


class HeadWeightedRows(Score):
    """``sum_h A[h, cls, j] g[h, j]`` with ``g`` the share of head h in token j's attended values.

    ``g[h, j] = |O[h, j]| / (sum_h |O[h, j]| + 1e-8)``, O the attended values before the output projection (AS-ViT,
    arXiv:2209.13802, eq. 5 and 6).

    Attributes:
        rows: Whose attention: the class token's.
    """

    kind: ClassVar[str] = "head_weighted_rows"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    rows: Literal["cls"] = "cls"

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        view = cut.attention()
        attended = b.cast(view.attended(), torch.float32)  # [B, H, N, D]
        norms = b.sqrt(b.sum(b.mul(attended, attended), 3))  # [B, H, N]
        share = b.div(norms, b.add(b.sum(norms, 1, keepdim=True), 1e-8))
        row = b.cast(b.squeeze(query_rows(cut, view, 0, 1), 2), torch.float32)  # [B, H, N]
        return b.sum(b.mul(row, share), 1)
