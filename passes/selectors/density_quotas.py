"""One budget for the crops of an image, by how little they repeat themselves."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from tokcc.passes.crops import crop_sizes, keep_flagged, proportional, within_quotas
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.features import FeatureKind, features
from tokcc.passes.ordering import HIGHEST, masked
from tokcc.passes.piece import OtherScore, Selector

__all__ = ["DensityQuotas"]

aten = torch.ops.aten


class DensityQuotas(Selector):
    """Split a budget between crops by their density, half of each quota by one score, half by another.

    A token is redundant when more than ``copies`` tokens of its crop, itself included, are more similar to it than
    ``similar``; the density of a crop is the share of the others (TokenCorrCompressor, arXiv:2407.14439). Every crop
    keeps one token, and of the rest a part in proportion to its density, rounded down; what that leaves goes to the
    best unselected tokens by the second score. The published numbers follow from outliers of both scores; a fixed
    budget and equal halves stand for them here.

    Attributes:
        second: The other score; the larger half of each quota is chosen by the step's.
        similar: Cosine above which two tokens count as alike.
        copies: How many tokens may be alike before they are redundant.
        of: Vectors that similarity is measured on: their mean over heads.
    """

    kind: ClassVar[str] = "density_quotas"

    second: OtherScore
    similar: float = Field(default=0.7, ge=-1.0, le=1.0)
    copies: int = Field(default=8, ge=1)
    of: FeatureKind = "keys"

    @property
    def of_batch(self) -> bool:
        """The budget is the image's."""
        return True

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`DensityQuotas`."""
        b = cut.b
        crops, size, total = crop_sizes(cut)
        if total < crops:
            cut.ctx.fail(
                f"{total} tokens are kept of {crops} crops",
                needed="at least one for each crop",
                help="give a larger budget",
            )
        metric = cut.inner(features(cut, self.of, "mean"))  # [P, M, D]
        alike = b.compare("gt", b.matmul(metric, b.transpose(metric, 1, 2)), self.similar)
        copies = b.sum(b.cast(alike, torch.int64), 2)  # [P, M]
        dense = b.sum(b.cast(b.compare("le", copies, self.copies), torch.int64), 1)  # [P]
        quota = b.call(aten.clamp_max.default, b.add(proportional(cut, dense, total - crops), 1), size)
        half = b.call(aten.div.Tensor_mode, b.add(quota, 1), 2, rounding_mode="floor")
        first = within_quotas(cut, cut.inner(masked(cut, score)), half)
        other = cut.inner(masked(cut, self.second.emit(cut)))
        key = b.where(b.compare("gt", first, 0), HIGHEST, other)
        flags = within_quotas(cut, key, quota, total)
        return keep_flagged(cut, flags, min(size, total - crops + 1), score)
