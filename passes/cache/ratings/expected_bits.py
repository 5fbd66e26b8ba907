"""The bits that a trained controller expects a token to need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from tokcc.ir.builder import Builder
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.rating import TokenRating
from tokcc.passes.cache.runs import run_from
from tokcc.passes.trained import TensorSpec, Trained, linear_specs

__all__ = ["ExpectedBits"]

aten = torch.ops.aten
_BITS = (2.0, 4.0, 8.0, 16.0)
_FEATURES = 4


class ExpectedBits(TokenRating, Trained):
    """Bits by a small network over four features of a token (after Don't Waste Bits; the features' formulas are ours).

    - Its frequency: a number of the file for every token of the vocabulary.
    - Its quality: the attention that it receives from the call's queries that see it, on average over them.
    - Variance and entropy (natural logarithm) of what its own query attends to, over the slots that it sees.

    The last three are means over the query heads of the layer. ``hidden, ReLU, bits, softmax`` gives probabilities of
    2, 4, 8 and 16 bits, and their expectation is the rating. All rows of the attention are computed beside it.

    The file holds ``frequency [V]``, ``hidden.weight [H, 4]``, ``bits.weight [4, H]``, both with a ``bias`` if they
    have one, and where features are standardised first, ``mean [4]`` and ``deviation [4]``.
    """

    kind: ClassVar[str] = "expected_bits"
    reads_ids: ClassVar[bool] = True

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`ExpectedBits`."""
        del sizes
        return (
            TensorSpec("frequency", ("V",)),
            *linear_specs("hidden", "H", _FEATURES),
            *linear_specs("bits", len(_BITS), "H"),
            TensorSpec("mean", (_FEATURES,), optional=True),
            TensorSpec("deviation", (_FEATURES,), optional=True),
        )

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`ExpectedBits`."""
        b = cut.b
        assert cut.ids is not None, "planning refuses models without token ids"
        frequency = b.call(aten.index_select.default, self.tensor(b, "frequency"), 0, b.reshape(cut.ids, [-1]))
        frequency = b.reshape(frequency, [b.size(cut.ids, 0), cut.new])
        features = b.call(aten.stack.default, [frequency, self._quality(cut), *self._spread(cut)], 2)  # [B, S, 4]
        if self.has("mean"):
            features = b.sub(features, self.tensor(b, "mean"))
        if self.has("deviation"):
            features = b.div(features, self.tensor(b, "deviation"))
        hidden = b.call(aten.relu.default, self.linear(b, features, "hidden"))
        chances = b.softmax(self.linear(b, hidden, "bits"), 2)
        return b.unsqueeze(b.sum(b.mul(chances, self._bits(b)), 2), 1)

    def _bits(self, b: Builder) -> Any:
        return b.constant("bits_of_classes", torch.tensor(_BITS))

    def _quality(self, cut: CacheCut) -> Any:
        """Return the mean attention received, ``[B, S]``."""
        b = cut.b
        received = b.mean(run_from(b, cut.received, 2, cut.past, cut.new), 1)
        # Padding is in front: all tokens behind a real one are real.
        behind = b.call(aten.flip.default, b.arange(cut.new, cut.key), [0])
        return b.div(received, b.cast(b.add(behind, 1), torch.float32))

    def _spread(self, cut: CacheCut) -> tuple[Any, Any]:
        """Return variance and entropy of the tokens' own rows, ``[B, S]`` each."""
        b = cut.b
        probs = cut.probs_at(b.arange(cut.new, cut.key))  # [B, Hkv, G, S, L]
        seen = b.clamp_min(
            b.cast(b.add(run_from(b, cut.rank(), 1, cut.past, cut.new), 1), torch.float32), 1.0
        )  # [B, S]
        squares = self._over_heads(b, b.sum(b.mul(probs, probs), 4))
        variance = b.sub(b.div(squares, seen), b.div(b.div(1.0, seen), seen))
        surprise = b.mul(probs, b.log(b.clamp_min(probs, 1e-30)))
        return variance, b.mul(self._over_heads(b, b.sum(surprise, 4)), -1.0)

    def _over_heads(self, b: Builder, x: Any) -> Any:
        """``[B, Hkv, G, S]`` to ``[B, S]``."""
        return b.mean(b.mean(x, 2), 1)
