"""Processes that are interrupted."""

from __future__ import annotations

import signal

__all__ = ["heed_signals"]


def heed_signals() -> None:
    """For a child, before it runs: a test run that a shell put in the background ignores SIGINT, and it would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
