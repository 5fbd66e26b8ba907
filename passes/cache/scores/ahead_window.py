"""Attention of the last queries, as if they stood behind the prompt."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.scores.window_attention import WindowAttention

__all__ = ["AheadWindow"]


class AheadWindow(WindowAttention):
    """What the last ``window`` queries would attend to ``shift`` positions later (after DapQ, arXiv:2603.11564).

    The queries are turned anew and see every entry, their own ones included; the mean over them is smoothed like
    SnapKV's window.

    Attributes:
        shift: How much later; None = by the window, so that they stand right behind the prompt.
    """

    kind: ClassVar[str] = "ahead_window"
    looks_ahead: ClassVar[bool] = True

    shift: int | None = None

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`AheadWindow`."""
        b = cut.b
        rows = b.min_sizes(self.window, cut.new)
        start = b.sub_sizes(cut.new, rows)
        query = b.slice(cut.unturned, 2, start, None)
        if cut.turn is not None:
            shift = self.window if self.shift is None else self.shift
            query = cut.turned(query, b.add(b.slice(cut.positions, 1, start, None), shift))
        probs = b.mul(cut.probs_of(query, rows), cut.real_rows(rows))
        return self._smoothed(cut, b.sum(probs, 3))
