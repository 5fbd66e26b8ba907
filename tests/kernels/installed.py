"""Whether triton is there."""

from __future__ import annotations

import pytest

from tokcc.kernels.gpu import has_triton

__all__ = ["needs_triton"]

needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
