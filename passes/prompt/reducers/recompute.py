"""Compute some tokens anew, and take old cache entries for the others."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, ClassVar

from pydantic import Field

from tokcc.passes.prompt.reducers.drop import Drop

__all__ = ["Recompute"]


class Recompute(Drop):
    """Only the selected tokens go on; in the caches of later layers the others have old entries (CacheBlend).

    No token is gone: caches of all layers have an entry for each, and later calls are ordinary. Of the R tokens that
    old entries are given for ``floor(share * R)`` are computed anew, and all others of the call.

    Attributes:
        share: r. 0 = only what has no old entries, 1 = everything.
    """

    kind: ClassVar[str] = "recompute"
    refills: ClassVar[bool] = True

    share: Annotated[float, Field(ge=0, le=1)]

    @property
    def ratio(self) -> Fraction:
        """The share as an exact decimal."""
        return Fraction(str(self.share))
