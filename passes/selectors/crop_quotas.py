"""One budget for a thumbnail and the crops of its parts."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from tokcc.passes.crops import best_flags, crop_sizes, keep_flagged, proportional, within_quotas
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.ordering import masked
from tokcc.passes.piece import OtherScore, Selector

__all__ = ["CropQuotas"]

aten = torch.ops.aten


class CropQuotas(Selector):
    """Split a budget between a thumbnail and crops by where its content is, then keep the best of each (HiRED).

    The batch is one image: the thumbnail, then its crops in rows (arXiv:2408.10945, section 4). A share of the budget
    is the thumbnail's. The rest goes to the crops by how many of the thumbnail's best tokens, by a score of early
    attention, lie in each: ``k_p = floor(K_s c_p / sum c)``. What rounding leaves goes to the best unselected tokens
    of all crops. An image without crops keeps the budget for itself.

    Attributes:
        content: The score of the thumbnail's content.
        rows: Rows of crops.
        columns: Columns of crops.
        thumbnail: The thumbnail's share; the rest of its tokens mark content.
        region: Which part of the thumbnail is a crop's: its ``rect``, or, as in the released code, ``bands`` of
            consecutive tokens.
    """

    kind: ClassVar[str] = "crop_quotas"

    content: OtherScore
    rows: int = Field(default=2, ge=1)
    columns: int = Field(default=2, ge=1)
    thumbnail: float = Field(default=0.5, ge=0.0, le=1.0)
    region: Literal["rect", "bands"] = "rect"

    @property
    def of_batch(self) -> bool:
        """The budget is the image's."""
        return True

    def select(self, cut: Cut, score: Any) -> Kept:
        """See :class:`CropQuotas`."""
        b = cut.b
        crops, size, total = crop_sizes(cut)
        if crops not in (1, 1 + self.rows * self.columns):
            cut.ctx.fail(
                f"the batch has {crops} images",
                needed=f"a thumbnail and {self.rows} x {self.columns} crops, or one image",
                help="set the parameters `rows` and `columns`, or export the model for this number of crops",
            )
        rating = cut.inner(masked(cut, score))  # [P, M]
        if crops == 1:
            return keep_flagged(cut, best_flags(cut, rating, total), total, score)
        share = Fraction(str(self.thumbnail))
        own = min(math.floor(total * share), size)
        rest = min(total - own, (crops - 1) * size)
        flags = [best_flags(cut, b.slice(rating, 0, 0, 1), own)]
        content = b.slice(cut.inner(masked(cut, self.content.emit(cut))), 0, 0, 1)  # [1, M]
        marks = best_flags(cut, content, math.floor(size * (1 - share)))
        regions = b.constant("tokcc_crop_regions", self._regions(cut, size))
        count = b.cast(b.squeeze(b.matmul(b.cast(marks, torch.float32), regions), 0), torch.int64)  # [P - 1]
        quota = b.call(aten.clamp_max.default, proportional(cut, count, rest), size)
        flags.append(within_quotas(cut, b.slice(rating, 0, 1), quota, rest))
        return keep_flagged(cut, b.cat(flags, 0), max(min(size, max(own, rest)), 1), score)

    def _regions(self, cut: Cut, size: int) -> torch.Tensor:
        """Which crop each token of the thumbnail lies in, one-hot ``[M, P - 1]``."""
        crops = self.rows * self.columns
        place = torch.arange(size)
        if self.region == "bands":
            return torch.nn.functional.one_hot(place * crops // size, crops).float()
        side = math.isqrt(size)
        if side * side != size:
            cut.ctx.fail(f"{size} tokens of the thumbnail are no square", help="use `region: bands`")
        row, column = place // side * self.rows // side, place % side * self.columns // side
        return torch.nn.functional.one_hot(row * self.columns + column, crops).float()
