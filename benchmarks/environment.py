"""What a result was measured on: machine, threads, versions. Every results file starts with it."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("tokcc", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")


def describe(threads: int) -> dict[str, Any]:
    """Return machine, thread count and package versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        # A busy machine is the usual reason for a wide spread: keep it beside the numbers.
        "load_average_1min": round(os.getloadavg()[0], 2),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def write_results(name: str, content: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``<folder>/<name>.json`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
