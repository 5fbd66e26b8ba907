"""How long compiling takes, and how much memory, against a plain export: models of 12, 24 and 48 layers.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --layers 12 --how plain

Each measurement is a process of its own, so that peak memory is that of one compile and nothing is warm. Imports and
building the model are in the memory but not in the time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

from benchmarks import tome_eager, vits
from benchmarks.engines import Model, compile_tokcc, export_plain
from benchmarks.environment import describe, write_results
from benchmarks.grid import short
from benchmarks.op_profile import node_count

R = 4  # small enough that 48 layers still have tokens to merge
WAYS: dict[str, Callable[[Model, Path], Path]] = {
    "plain": lambda model, folder: export_plain(model, folder / "plain.onnx"),
    "eager-tome": lambda model, folder: export_plain(tome_eager.patched(model, R), folder / "eager.onnx"),
    "tokcc-none": lambda model, folder: compile_tokcc(model, "none", folder / "none"),
    "tokcc-tome": lambda model, folder: compile_tokcc(model, short("tome", r=R), folder / "tome"),
}


def once(how: str, size: str, layers: int) -> dict[str, Any]:
    """Compile in this process and return time, memory and graph size."""
    model = vits.model(size, 1, layers=layers)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        engine = WAYS[how](model, Path(scratch))
        seconds = time.perf_counter() - start
        nodes, size_mb = node_count(engine), engine.stat().st_size / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return {
        "how": how,
        "model": size,
        "layers": layers,
        "seconds": round(seconds, 2),
        "peak_mb": round(peak / (1e6 if sys.platform == "darwin" else 1e3)),
        "nodes": nodes,
        "engine_mb": round(size_mb, 1),
    }


def in_process(how: str, size: str, layers: int) -> dict[str, Any]:
    """Run :func:`once` in a fresh process."""
    command = [sys.executable, __file__, "--how", how, "--model", size, "--layers", str(layers), "--once"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"how": how, "model": size, "layers": layers, "error": last}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="compile time and peak memory against a plain export")
    parser.add_argument("--layers", action="append", type=int, help="default: 12, 24 and 48")
    parser.add_argument("--how", action="append", choices=list(WAYS), help="default: all")
    parser.add_argument("--model", choices=sorted(vits.WIDTHS), default="vit-s")
    parser.add_argument("--once", action="store_true", help="measure one combination in this process, print JSON")
    parser.add_argument("--name", default="compile_time", help="results file name")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once(options.how[0], options.model, options.layers[0])))
        return 0
    rows = []
    print("| layers | how | seconds | peak MB | nodes |\n|---:|---|---:|---:|---:|")
    for layers in options.layers or (12, 24, 48):
        for how in options.how or WAYS:
            row = in_process(how, options.model, layers)
            rows.append(row)
            cells = [str(row.get(key, "-")) for key in ("layers", "how", "seconds", "peak_mb", "nodes")]
            print(f"| {' | '.join(cells)} |" + (f" {row['error']}" if "error" in row else ""), flush=True)
    content = {
        "what": "wall time and peak resident memory of one compile, a process each, float32, batch 1, 224 pixels",
        "environment": describe(threads=0),
        "rows": rows,
    }
    print(f"\nwrote {write_results(options.name, content)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
