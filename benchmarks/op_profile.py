"""Where an engine spends its time, and how much work it does, from onnxruntime's own profile.

    python benchmarks/op_profile.py out/model.onnx --batch 8

Nodes whose name contains ``tokcc`` are those that the compiler inserted. (The file is not called ``profile.py``: run as
a script it would hide the standard library's module of that name, which torch imports.)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a plain file

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.engines import Feeds, open_session

INSERTED = "tokcc"


@dataclass(frozen=True)
class Event:
    """One run of one node.

    Attributes:
        name: Node name after onnxruntime's fusions.
        op: Operator.
        microseconds: Duration.
        inputs: Input shapes.
        outputs: Output shapes.
    """

    name: str
    op: str
    microseconds: float
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]

    @property
    def inserted(self) -> bool:
        """Whether the compiler put the node there."""
        return INSERTED in self.name


def record(engine: Path, feeds: Feeds, threads: int, *, runs: int, optimise: bool = True) -> list[list[Event]]:
    """Run an engine ``runs`` times (after one warm-up run) and return each run's node events."""
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(engine, threads, optimise=optimise, profile=Path(scratch) / "profile")
        for _ in range(runs + 1):
            session.run(None, feeds)
        entries = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    # A run's nodes precede the `model_run` entry that closes it when the file is read in time order.
    entries.sort(key=lambda entry: entry["ts"] + entry["dur"])
    all_runs: list[list[Event]] = []
    current: list[Event] = []
    for entry in entries:
        if entry["cat"] == "Node" and entry["name"].endswith("_kernel_time"):
            current.append(_event(entry))
        elif entry["name"] == "model_run":
            all_runs.append(current)
            current = []
    return all_runs[1:]


def _event(entry: dict[str, Any]) -> Event:
    details = entry["args"]

    def shapes(key: str) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(next(iter(item.values()))) for item in details.get(key, []))

    return Event(
        entry["name"].removesuffix("_kernel_time"),
        details["op_name"],
        float(entry["dur"]),
        shapes("input_type_shape"),
        shapes("output_type_shape"),
    )


def matrix_flops(engine: Path, feeds: Feeds) -> int:
    """Floating-point operations of all matrix multiplications and convolutions, with the shapes of a real run.

    Counted on the graph as written (no fusion), so that only standard operators occur; multiply and add count as two.
    """
    (events,) = record(engine, feeds, threads=1, runs=1, optimise=False)
    return sum(flops(event) for event in events)


def flops(event: Event) -> int:
    """Floating-point operations of one node; 0 for those that are not matrix products."""
    if event.op in {"MatMul", "FusedMatMul", "Gemm"}:
        return 2 * math.prod(event.outputs[0]) * event.inputs[0][-1]
    if event.op == "Conv":
        return 2 * math.prod(event.outputs[0]) * math.prod(event.inputs[1][1:])
    if event.op == "Attention" and len(event.inputs[0]) == 4:
        queries, keys = event.inputs[:2]
        return 2 * 2 * math.prod(queries) * keys[-2]
    return 0


def by_operator(runs: list[list[Event]]) -> list[dict[str, Any]]:
    """Mean milliseconds per operator and origin, largest first."""
    time: defaultdict[tuple[str, bool], float] = defaultdict(float)
    count: Counter[tuple[str, bool]] = Counter()
    for events in runs:
        for event in events:
            time[event.op, event.inserted] += event.microseconds
            count[event.op, event.inserted] += 1
    rows = [
        {
            "op": op,
            "inserted": inserted,
            "nodes": count[op, inserted] // len(runs),
            "ms": total / len(runs) / 1000,
        }
        for (op, inserted), total in time.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def inserted_share(runs: list[list[Event]], *, net: bool = False) -> float:
    """Fraction of the time spent in inserted nodes: the median over the runs.

    Args:
        runs: Events of each run.
        net: Take off every node what the cheapest nodes take (the fifth percentile). Those do nothing but change a
            shape: their time is the writing of the event, which counts as the node's own and is most of what small
            nodes seem to take.
    """
    shares = []
    for events in runs:
        spent = np.array([event.microseconds for event in events])
        if net and len(spent):
            spent = np.maximum(spent - np.percentile(spent, 5), 0.0)
        inserted = sum(time for time, event in zip(spent, events, strict=True) if event.inserted)
        total = float(spent.sum())
        shares.append(float(inserted) / total if total else 0.0)
    return float(np.median(shares)) if shares else 0.0


def node_count(engine: Path) -> int:
    """Nodes of the graph as written."""
    return len(onnx.load(engine, load_external_data=False).graph.node)


def example_feeds(engine: Path, batch: int, tokens: int, seed: int = 0) -> Feeds:
    """Random inputs for an engine; symbolic axes get ``batch`` (first axis) or ``tokens``."""
    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    session = ort.InferenceSession(str(engine), providers=["CPUExecutionProvider"])
    for item in session.get_inputs():
        shape = [
            side if isinstance(side, int) else (batch if axis == 0 else tokens) for axis, side in enumerate(item.shape)
        ]
        if item.type == "tensor(float)":
            feeds[item.name] = rng.standard_normal(shape, dtype=np.float32)
        elif "mask" in item.name:
            feeds[item.name] = np.ones(shape, dtype=np.int64)
        else:
            feeds[item.name] = rng.integers(0, 1000, shape, dtype=np.int64)
    return feeds


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="per-operator time of an ONNX engine")
    parser.add_argument("engine", type=Path)
    parser.add_argument("--batch", type=int, default=1, help="size of a symbolic first axis")
    parser.add_argument("--tokens", type=int, default=64, help="size of any other symbolic axis")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    feeds = example_feeds(options.engine, options.batch, options.tokens)
    runs = record(options.engine, feeds, options.threads, runs=options.runs)
    rows = by_operator(runs)
    share = inserted_share(runs)
    if options.json:
        print(json.dumps({"engine": str(options.engine), "inserted_share": share, "operators": rows}, indent=2))
        return 0
    print("| operator | origin | nodes | ms |\n|---|---|---:|---:|")
    for row in rows:
        print(f"| {row['op']} | {'tokcc' if row['inserted'] else 'model'} | {row['nodes']} | {row['ms']:.2f} |")
    total = sum(row["ms"] for row in rows)
    print(f"\n{total:.1f} ms in nodes, {share:.1%} of it in inserted ones (mean of {len(runs)} runs)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
