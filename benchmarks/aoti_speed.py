"""How fast the AOTInductor engine of ToMe is: against the ONNX engine, compiled research code, and no reduction.

    python benchmarks/aoti_speed.py                       # ViT-S/16, batch 1 and 8, one thread
    python benchmarks/aoti_speed.py --batch 1 --layers 2 --image-size 64 --rounds 3 --name try

All engines of one batch run in turns in one process; ratios are taken round by round. Each engine's speed-up is over
the same backend's engine without reduction (torch.compile's over AOTInductor's, its own compiler); "ideal" is the ratio
of the matrix FLOPs, counted with the shapes of a real run. torch.compile runs the patched Python of `tome_eager.py`, as
it is and with frozen weights.
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
import torch

from benchmarks import tome_eager, vits
from benchmarks.engines import Model
from benchmarks.environment import describe, write_results
from benchmarks.grid import short
from benchmarks.op_profile import matrix_flops
from benchmarks.timing import Seconds, interleave, milliseconds, speedups

R = 13
PLAIN_ORT, PLAIN_AOTI = "plain, ONNX Runtime", "plain, AOTInductor"
ORT, AOTI = f"tokcc tome r={R}, ONNX Runtime", f"tokcc tome r={R}, AOTInductor"
COMPILED = f"eager ToMe r={R}, torch.compile"
FROZEN = f"{COMPILED}, frozen"
OVER = {ORT: PLAIN_ORT, AOTI: PLAIN_AOTI, COMPILED: PLAIN_AOTI, FROZEN: PLAIN_AOTI}
"""What each engine's speed-up is over."""


def build(model: Model, folder: Path, threads: int) -> tuple[dict[str, Callable[[], Any]], float]:
    """Make all engines: what runs each, and the ideal speed-up."""
    import tokcc
    from tokcc.backends.sessions import open_engine

    bundle = tokcc.compile(
        model.module,
        short("tome", r=R),
        example_inputs=model.args,
        backends=("onnx", "aoti"),
        output=folder / "tome",
        calibrate=False,
        keep_baseline=True,
    )
    paths = {
        PLAIN_ORT: bundle.baseline,
        ORT: bundle.engine("onnx"),
        PLAIN_AOTI: bundle.baseline_of("aoti"),
        AOTI: bundle.engine("aoti"),
    }
    feeds = model.feeds()
    runs: dict[str, Callable[[], Any]] = {
        name: partial(open_engine(path, threads=threads).run, feeds) for name, path in paths.items()
    }
    eager = tome_eager.patched(model, R)
    for name, options in ((COMPILED, {}), (FROZEN, {"freezing": True})):
        compiled = torch.compile(eager.module, options=options or None)
        runs[name] = partial(_run, compiled, model.args)
    return runs, matrix_flops(paths[PLAIN_ORT], feeds) / matrix_flops(paths[ORT], feeds)


def _run(module: Callable[..., torch.Tensor], args: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    with torch.inference_mode():
        return {"logits": module(*args).numpy()}


def rows(model: Model, seconds: Seconds, ideal: float, outputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Put everything known about each engine into one row."""
    found = []
    for name, values in seconds.items():
        row: dict[str, Any] = {
            "model": model.name,
            "batch": len(model.args[0]),
            "engine": name,
            "ms": milliseconds(values),
        }
        if name in OVER:
            speedup = speedups(seconds, OVER[name])[name]
            row |= {"over": OVER[name], "speedup": speedup, "ideal_speedup": ideal}
            row["realised_share"] = speedup["median"] / ideal
            row["difference_from_onnx"] = float(np.abs(outputs[name] - outputs[ORT]).max())
        if name != AOTI:
            row["time_over_aoti_engine"] = speedups(seconds, name)[AOTI]
        found.append(row)
    return found


HEADER = """\
| model | B | engine | ms | speed-up (quartiles) | of ideal | time over the AOTI engine's |
|---|---:|---|---:|---:|---:|---:|"""


def markdown_row(row: dict[str, Any]) -> str:
    """One line of the table."""
    speedup, other = row.get("speedup"), row.get("time_over_aoti_engine")
    cells = [row["model"], str(row["batch"]), row["engine"], f"{row['ms']['median']:.2f}"]
    cells += [f"{speedup['median']:.2f} ({speedup['p25']:.2f}-{speedup['p75']:.2f})" if speedup else "-"]
    cells += [f"{row['realised_share']:.2f}" if speedup else "-"]
    cells += [f"{other['median']:.2f} ({other['p25']:.2f}-{other['p75']:.2f})" if other else "-"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="latency of the AOTInductor engine of ToMe")
    parser.add_argument("--model", default="vit-s", choices=sorted(vits.WIDTHS))
    parser.add_argument("--batch", action="append", type=int, help="default: 1 and 8")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processor-time", action="store_true", help="leave out what a run waits for its core")
    parser.add_argument("--name", default="aoti_speed", help="results file name")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    clock = time.process_time if options.processor_time else time.perf_counter
    found: list[dict[str, Any]] = []
    print(HEADER)
    for batch in options.batch or (1, 8):
        model = vits.model(options.model, batch, layers=options.layers, image_size=options.image_size)
        with tempfile.TemporaryDirectory() as scratch:
            runs, ideal = build(model, Path(scratch), options.threads)
            outputs = {name: next(iter(run().values())) for name, run in runs.items()}
            seconds = interleave(runs, options.rounds, clock=clock)
        for row in rows(model, seconds, ideal, outputs):
            print(markdown_row(row), flush=True)
            found.append(row)
        torch.compiler.reset()
    content = {
        "what": "CPU latency, engines in turns; speed-ups over the same backend without reduction, round by round",
        "environment": describe(options.threads),
        "clock": "processor" if options.processor_time else "wall",
        "rounds": options.rounds,
        "rows": found,
    }
    print(f"\nwrote {write_results(options.name, content)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
