"""Builds engines with TensorRT for RTX, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

__all__ = ["TARGETS", "build", "needs_rtx"]

TARGETS = ("8.0", "8.6", "8.9", "12.0")

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx: pip install -e '.[tensorrt]'"
)


def build(folder: Path, *, targets: tuple[str, ...] = TARGETS, timeout: float = 600) -> dict[str, Any]:
    """Run the folder's own ``build_engine.py``; a crash of the builder is an answer, too."""
    command = [sys.executable, "build_engine.py", "--rtx", "--json", "--compute-capability", *targets]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=timeout)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"ok": False, "error": f"the builder ended with {done.returncode}: {done.stderr[-300:]}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found
