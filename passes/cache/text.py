"""Whether a call brings text or one generated token."""

from __future__ import annotations

from typing import Any

from tokcc.passes.cache.cut import CacheCut

__all__ = ["is_text"]


def is_text(cut: CacheCut) -> Any:
    """Return bool ``[1]``: the call has more than one token."""
    b = cut.b
    extra = b.amax(b.arange(cut.new, cut.key), 0, keepdim=True)  # S - 1
    return b.compare("gt", extra, 0)
