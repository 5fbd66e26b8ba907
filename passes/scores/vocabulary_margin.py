"""How near tokens are to certain entries of a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.cut import Cut
from tokcc.passes.features import features, normalised
from tokcc.passes.piece import Score
from tokcc.passes.trained import TensorSpec, Trained, linear_specs

__all__ = ["VocabularyMargin"]


class VocabularyMargin(Trained, Score):
    """Rates tokens low that lie near target entries of an embedding table (EmbedLens, arXiv:2603.00510).

    With ``u_i = max_{e in targets} cos(z_i, e) - (n-th largest cosine to any entry)`` the score is ``-u_i``: negative
    or zero exactly for the tokens among whose n nearest entries is a target. Tensors: ``vocabulary`` ``[V, D]``, the
    language model's embedding table.

    Attributes:
        targets: Entries that sinks and dead tokens are nearest to; they differ from model to model.
        nearest: n; 0 = the score is the negated cosine to the nearest target alone, which needs no product with the
            whole table.
        projection: Bring tokens to the table's space first, ``projection.weight`` ``[D, C]``; without it the table has
            the tokens' width.
    """

    kind: ClassVar[str] = "vocabulary_margin"

    targets: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    nearest: int = Field(default=3, ge=0)
    projection: bool = False

    def tensors(self, sizes: Mapping[str, int]) -> Sequence[TensorSpec]:
        """See :class:`VocabularyMargin`."""
        del sizes
        table = TensorSpec("vocabulary", ("V", "D" if self.projection else "C"))
        return (table, *(linear_specs("projection", "D", "C") if self.projection else ()))

    def emit(self, cut: Cut) -> Any:
        """Return ``[B, N]``."""
        b = cut.b
        table = self.weight("vocabulary")
        wrong = [target for target in self.targets if target >= len(table)]
        if wrong:
            cut.ctx.fail(
                f"the target {wrong[0]} is no entry of a vocabulary of {len(table)}",
                help="give the `targets` of this vocabulary",
            )
        z = features(cut, "features", normalise=False)  # fp32 [B, N, C]
        z = normalised(b, self.linear(b, z, "projection") if self.projection else z)
        unit = table / table.norm(dim=1, keepdim=True).clamp_min(1e-12)
        if not self.nearest:
            own = b.constant(f"{self.kind}_targets", unit[list(self.targets)].T.contiguous())
            return b.mul(b.amax(b.matmul(z, own), 2), -1.0)
        every = b.matmul(z, b.constant(f"{self.kind}_vocabulary", unit.T.contiguous()))  # [B, N, V]
        # Out of the same product, so that the difference is exactly zero where a target is the n-th nearest.
        places = b.constant(f"{self.kind}_places", torch.tensor(self.targets))
        best = b.amax(b.call(torch.ops.aten.index_select.default, every, 2, places), 2)
        largest = b.parts(b.call(torch.ops.aten.topk.default, every, min(self.nearest, len(table)), 2), 2)[0]
        return b.sub(b.squeeze(b.slice(largest, 2, min(self.nearest, len(table)) - 1), 2), best)
