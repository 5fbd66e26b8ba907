"""Whether the memory of a generation stays constant: resident memory of the process over many thousand tokens.

python benchmarks/memory.py                                  # SmolLM2-135M, streaming-llm of 256, 20,000 tokens
python benchmarks/memory.py --policy h2o --tokens 512 --new 5000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

import tokcc
from benchmarks.environment import describe, write_results
from benchmarks.grid import short
from examples.assets import LANGUAGE_MODEL, locate
from tokcc.backends.generation import Generator


def resident_mb() -> float:
    """Resident memory of this process in MB (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="resident memory over a long generation")
    parser.add_argument("--policy", default="streaming-llm")
    parser.add_argument("--tokens", type=int, default=256, help="capacity")
    parser.add_argument("--new", type=int, default=20_000, help="generated tokens")
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--name", default="decoder_memory", help="results file name")
    options = parser.parse_args()
    folder = locate(LANGUAGE_MODEL)[0].parent
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        policy = short(options.policy, tokens=options.tokens)
        bundle = tokcc.compile(folder, policy, output=Path(scratch) / "out", calibrate=False, task="text-generation")
        steps = Generator(bundle, threads=1).stream([[504, 338, 253]], max_new_tokens=options.new, stop=[])
        print("| generated | resident MB | cache MB |\n|---:|---:|---:|")
        for count, _ in enumerate(steps, 1):
            if count % options.every == 0:
                row = {"generated": count, "resident_mb": resident_mb(), "cache_mb": steps.cache_bytes / 1e6}
                rows.append(row)
                print(f"| {count} | {row['resident_mb']:.0f} | {row['cache_mb']:.2f} |", flush=True)
    content = {
        "what": f"resident memory while {options.policy} with {options.tokens} entries generates",
        "environment": describe(1),
        "model": LANGUAGE_MODEL.name,
        "rows": rows,
    }
    print(f"\nwrote {write_results(options.name, content)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
