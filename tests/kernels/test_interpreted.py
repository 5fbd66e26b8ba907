"""Triton kernels in the interpreter, which is chosen when triton is imported: in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.installed import needs_triton

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "interpreted"

pytestmark = needs_triton


@pytest.mark.parametrize("cases", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_equal_brute_force(cases: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", cases]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, str(FOLDER)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0
    assert " passed" in done.stdout
