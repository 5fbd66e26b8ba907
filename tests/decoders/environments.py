"""Virtual environments for runtimes whose dependencies exclude ours, made once and kept under `.runtimes/`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock
import pytest

__all__ = ["clean_variables", "environment", "run_driver"]

ROOT = Path(__file__).parents[2] / ".runtimes"
_MINUTES = 8


def environment(name: str, requirements: Sequence[str]) -> Path:
    """Return the Python of an environment with these packages; skips the test where it cannot be made.

    A finished environment says in a file what was asked for, so that other requirements make it anew.
    """
    folder, wanted = ROOT / name, "\n".join((sys.version, *requirements))
    python, ready = folder / "bin" / "python", folder / "ready.txt"
    ROOT.mkdir(exist_ok=True)
    with filelock.FileLock(ROOT / f"{name}.lock"):
        if ready.is_file() and ready.read_text() == wanted and python.exists():
            return python
        shutil.rmtree(folder, ignore_errors=True)
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", "--retries", "1", *requirements],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=60 * _MINUTES, check=False)
            except subprocess.TimeoutExpired:
                pytest.skip(f"no environment for {name}: {command[2]} took more than {_MINUTES} minutes")
            if done.returncode:
                last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
                pytest.skip(f"no environment for {name}: {' '.join(last)}")
        ready.write_text(wanted)
    return python


def run_driver(python: Path, driver: Path, job: Any, folder: Path, **variables: str) -> Any:
    """Run a script of `drivers/` in an environment, with a job on standard input; returns what it wrote to its file."""
    result = folder / "result.json"
    done = subprocess.run(
        [str(python), str(driver), str(result)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=folder,
        env=clean_variables() | {"OMP_NUM_THREADS": "1", **variables},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


def clean_variables() -> dict[str, str]:
    """Return the variables of this process without those that would lead another Python to our packages."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
