"""What the class token's value has in common with the other tokens' values."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tokcc.passes.cut import Cut
from tokcc.passes.ordering import LOWEST
from tokcc.passes.piece import Score

__all__ = ["ValueSimilarity"]


class ValueSimilarity(Score):
    """``mean_h softmax_j(v_cls^h . v_j^h)`` over all tokens, not scaled (FlowCut, arXiv:2505.19536).

    Attributes:
        to: The token that the others are compared with.
    """

    kind: ClassVar[str] = "value_similarity"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    to: ClassVar[str] = "cls"

    def emit(self, cut: Cut) -> Any:
        """Return fp32 ``[B, N]``."""
        b = cut.b
        value = b.cast(cut.attention().value, torch.float32)  # [B, H, N, D]
        products = b.matmul(b.slice(value, 2, 0, 1), b.transpose(value, 2, 3))  # [B, H, 1, N]
        if cut.valid is not None:
            products = b.where(b.unsqueeze(b.unsqueeze(cut.valid, 1), 1), products, LOWEST)
        return b.squeeze(b.mean(b.softmax(products, 3), 1), 1)
