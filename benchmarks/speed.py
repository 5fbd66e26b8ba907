"""How fast the engines are: tokcc's against the plain export and against exported research code.

    python benchmarks/speed.py                        # ViT-S/16 and ViT-B/16, batch 1 and 8
    python benchmarks/speed.py --model vit-s --batch 1 --rounds 5
    python benchmarks/speed.py --without-tokcc        # only plain and eager-ToMe exports

All engines of one model and batch run in turns in one process (A B C, B C A, ...); a speed-up is the median over rounds
of the ratio to the plain export in the same round. "Ideal" is the ratio of the matrix FLOPs, counted with the shapes of
a real run. The policy `none` shows what cleaning and demand slicing give before any token is dropped. Two figures say
what a method costs by itself: "inserted" is the profile's share of inserted nodes, less what profiling adds to each
node (`op_profile.inserted_share`); "choosing" is the time that an engine saves which has the same number of tokens in
every layer but takes them at even distances (which leaves out the size bias in the attention, too).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

import numpy as np

from benchmarks import tome_eager, vits
from benchmarks.engines import Model, compile_tokcc, export_plain, open_session
from benchmarks.environment import describe, write_results
from benchmarks.grid import Policy, short
from benchmarks.op_profile import inserted_share, matrix_flops, node_count, record
from benchmarks.timing import interleave, milliseconds, speedups

PLAIN = "plain export"
R = 13
EAGER = f"eager ToMe r={R}, exported"
POLICIES: dict[str, Policy | str] = {
    "tokcc none": "none",
    f"tokcc tome r={R}": short("tome", r=R),
    f"tokcc uniform r={R}": short("uniform", at={"layers": "all"}, budget={"remove": R}),
    "tokcc evit keep=0.7": short("evit", keep=0.7),
    "tokcc uniform keep=0.7": short("uniform", keep=0.7),
}
SAME_TOKENS = {f"tokcc tome r={R}": f"tokcc uniform r={R}", "tokcc evit keep=0.7": "tokcc uniform keep=0.7"}
"""For each method an engine with as many tokens per layer that chooses them at no cost."""


def build(model: Model, folder: Path, *, with_tokcc: bool, failures: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Make all engines of one model; one that fails is noted and left out."""
    makers: dict[str, Callable[[], Path]] = {
        PLAIN: partial(export_plain, model, folder / "plain.onnx"),
        EAGER: partial(export_plain, tome_eager.patched(model, R), folder / "eager.onnx"),
    }
    if with_tokcc:
        for index, (name, policy) in enumerate(POLICIES.items()):
            makers[name] = partial(compile_tokcc, model, policy, folder / f"tokcc{index}")
    built: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        print(f"{model.name}: {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            path = make()
        except Exception as error:  # the other engines are still worth measuring; the failure is in the results
            failures[f"{model.name} {name}"] = f"{type(error).__name__}: {error}"
            print(f"failed: {name}\n{error}", file=sys.stderr)
            continue
        built[name] = {"path": path, "build_seconds": round(time.perf_counter() - start, 1)}
    return built


def measure(model: Model, built: dict[str, dict[str, Any]], threads: int, rounds: int) -> list[dict[str, Any]]:
    """Time all engines in turns and put everything known about each into one row."""
    feeds = model.feeds()
    sessions = {name: open_session(entry["path"], threads) for name, entry in built.items()}
    outputs = {name: session.run(None, feeds)[0] for name, session in sessions.items()}
    seconds = interleave({name: partial(session.run, None, feeds) for name, session in sessions.items()}, rounds)
    ratios = speedups(seconds, PLAIN)
    flops = {name: matrix_flops(entry["path"], feeds) for name, entry in built.items()}
    rows = []
    for name, entry in built.items():
        row: dict[str, Any] = {
            "model": model.name,
            "batch": len(model.args[0]),
            "engine": name,
            "build_seconds": entry["build_seconds"],
            "nodes": node_count(entry["path"]),
            "gflops": flops[name] / 1e9,
            "ms": milliseconds(seconds[name]),
            "output_difference": float(np.abs(outputs[name] - outputs[PLAIN]).max()),
        }
        if name != PLAIN:
            ideal = flops[PLAIN] / flops[name]
            row["ideal_speedup"] = ideal
            row["speedup"] = ratios[name]
            row["realised_share"] = ratios[name]["median"] / ideal
            runs = record(entry["path"], feeds, threads, runs=10)
            row["inserted_time_share"] = inserted_share(runs, net=True)
            row["inserted_nodes"] = sum(event.inserted for event in runs[0])
        if name not in (PLAIN, EAGER) and EAGER in seconds:
            row["speedup_over_eager_tome"] = speedups(seconds, EAGER)[name]
        if name in SAME_TOKENS and SAME_TOKENS[name] in seconds:
            row["choosing_time_share"] = 1 - speedups(seconds, name)[SAME_TOKENS[name]]["median"] ** -1
        rows.append(row)
    return rows


def markdown_row(row: dict[str, Any]) -> str:
    """One line of the table."""
    speedup = row.get("speedup")
    cells = [row["model"], str(row["batch"]), row["engine"], f"{row['ms']['median']:.1f}", str(row["nodes"])]
    cells += [f"{row['gflops']:.2f}", f"{row['ideal_speedup']:.2f}" if speedup else "-"]
    cells += [f"{speedup['median']:.2f} ({speedup['p25']:.2f}-{speedup['p75']:.2f})" if speedup else "-"]
    cells += [f"{row['realised_share']:.2f}" if speedup else "-"]
    cells += [f"{row['inserted_time_share']:.1%}" if speedup else "-"]
    cells += [f"{row['choosing_time_share']:.1%}" if "choosing_time_share" in row else "-"]
    cells += [f"{row['build_seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


HEADER = """\
| model | B | engine | ms | nodes | GFLOPs | ideal | speed-up (quartiles) | of ideal | inserted | choosing | build s |
|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="latency of reduced engines against plain and eager exports")
    parser.add_argument("--model", action="append", choices=sorted(vits.WIDTHS), help="default: all")
    parser.add_argument("--batch", action="append", type=int, help="default: 1 and 8")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-tokcc", action="store_true")
    parser.add_argument("--name", default="speed", help="results file name")
    options = parser.parse_args()

    failures: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    print(HEADER)
    for size in options.model or sorted(vits.WIDTHS, reverse=True):
        for batch in options.batch or (1, 8):
            model = vits.model(size, batch, layers=options.layers, image_size=options.image_size)
            with tempfile.TemporaryDirectory() as scratch:
                built = build(model, Path(scratch), with_tokcc=not options.without_tokcc, failures=failures)
                found = measure(model, built, options.threads, options.rounds)
            for row in found:
                print(markdown_row(row), flush=True)
            rows += found
    content = {
        "what": "onnxruntime CPU latency, engines in turns, ratios to the plain export of the same round",
        "environment": describe(options.threads),
        "rounds": options.rounds,
        "policies": {} if options.without_tokcc else POLICIES,
        "failures": failures,
        "rows": rows,
    }
    print(f"\nwrote {write_results(options.name, content)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
