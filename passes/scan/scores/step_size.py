"""The step size: how much a token changes a state."""

from __future__ import annotations

from typing import Any, ClassVar

from tokcc.passes.scan.cut import ScanCut
from tokcc.passes.scan.piece import ScanScore

__all__ = ["StepSize"]


class StepSize(ScanScore):
    """The step size itself, after its bias and softplus (Mamba's delta; LongMamba, arXiv:2504.16053)."""

    kind: ClassVar[str] = "step_size"

    def emit(self, cut: ScanCut) -> Any:
        """See :class:`StepSize`."""
        return cut.step
