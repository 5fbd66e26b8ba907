"""Attention of the last queries of a prompt, and of what a draft expects behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from tokcc.passes.cache.beside import LOOKAHEAD
from tokcc.passes.cache.cut import CacheCut
from tokcc.passes.cache.runs import run_of
from tokcc.passes.cache.scores.window_attention import WindowAttention
from tokcc.passes.inputs import EngineInput, Guided

__all__ = ["LookaheadWindow"]


class LookaheadWindow(WindowAttention, Guided):
    """What the last ``window`` queries and those of the look-ahead attend to (SpecKV, arXiv:2506.08373).

    The look-ahead's tokens come from the caller, are read by the model behind the prompt, and are gone after the call.
    The softmax of their queries runs over the prompt and over themselves; the largest probability over all queries and
    the heads of a group counts. Without any this is SnapKV's window with maxima.
    """

    kind: ClassVar[str] = "lookahead_window"
    reads_beside: ClassVar[bool] = True

    rows: Literal["sum", "max"] = "max"
    group: Literal["mean", "max"] = "max"
    when: Literal["before_pool", "after_pool"] = "before_pool"

    def inputs(self) -> Sequence[EngineInput]:
        """The look-ahead."""
        return (LOOKAHEAD,)

    def emit(self, cut: CacheCut) -> Any:
        """See :class:`LookaheadWindow`."""
        b, wide = cut.b, cut.wide
        assert wide is not None, "the score reads tokens beside the call's"
        rows = b.add_sizes(b.min_sizes(self.window, cut.new), b.sub_sizes(wide.new, cut.new))
        # Rows of padding count nothing: those of a shorter look-ahead see the prompt, too.
        probs = b.mul(wide.probs(rows), wide.real_rows(rows))
        return self._before_window(cut, run_of(b, self._over_rows(b, probs), 3, 0, cut.total))
