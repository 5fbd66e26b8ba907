"""Importance by trained cross-attention of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tokcc.passes.blocks import Blocks
from tokcc.passes.cut import Cut
from tokcc.passes.features import features
from tokcc.passes.ordering import LOWEST, around
from tokcc.passes.piece import Score
from tokcc.passes.subset import candidates_valid
from tokcc.passes.texts import TextGuided
from tokcc.passes.trained import TensorSpec

__all__ = ["CrossAttention"]


class CrossAttention(TextGuided, Blocks, Score):
    """The largest attention that any row of the text, in any head, pays to a token (QTSplus, arXiv:2511.11910).

    ``r = max_h max_t softmax(q_t k^T / sqrt(d))`` over the tokens, with RMSNorm on either side and no positions.
    Tensors: ``text_norm.weight`` ``[D]``, ``token_norm.weight`` ``[C]``, ``cross_attn.q_proj``, ``cross_attn.k_proj``.
    """

    kind: ClassVar[str] = "cross_attention"

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`CrossAttention`."""
        del sizes
        return [
            TensorSpec("text_norm.weight", ("D",)),
            TensorSpec("token_norm.weight", ("C",)),
            *self.projection_specs("cross_attn", "qk", "D", "C"),
        ]

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``; 0 at the protected tokens."""
        b = cut.b
        x = self.normed(b, cut.inner(features(cut, "features", normalise=False)), "token_norm", "rms")
        text, true, _ = self.read_text(cut, self.weight("text_norm.weight").shape[0])
        text = self.normed(b, text, "text_norm", "rms")
        probs = self.probs(b, text, x, "cross_attn", candidates_valid(cut), cut.x)  # [B, H, T, M]
        best = b.amax(b.where(b.unsqueeze(true, 2), b.amax(probs, 1), LOWEST), 1)
        return around(cut, best)
