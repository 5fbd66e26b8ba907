"""Every encoder with every kind of policy: reduce, slice, lower, run in ONNX Runtime, compare with eager.

``python -m tests.zoo.matrix`` writes ``benchmarks/results/zoo_matrix.json`` again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tests.zoo.models import TEXT_LENGTH, ZOO, ZooModel
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.backends.ort import Session
from tokcc.backends.parity import oracle
from tokcc.errors import AxisError, PlanError
from tokcc.ir.program import Program
from tokcc.passes.plan import Plan
from tokcc.passes.propagate import Propagate
from tokcc.passes.slice_demand import SliceDemand
from tokcc.testing import plan_for, trace

__all__ = [
    "LIMIT",
    "RESULTS",
    "Case",
    "Row",
    "cases",
    "read_rows",
    "reduced",
    "relative_difference",
    "run_case",
    "write_rows",
]

LIMIT = 2e-4
"""Largest difference between engine and oracle, as a share of the output's scale."""
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "zoo_matrix.json"
TRACED_BATCH = 3
_LENGTHS = {1: TEXT_LENGTH, 2: 12, 5: 30}


@dataclass(frozen=True, order=True)
class Case:
    """One cell: a model, a preset, and whether batch and length are symbolic."""

    model: str
    preset: str
    dynamic: bool

    def __str__(self) -> str:
        return f"{self.model}-{self.preset}-{'dynamic' if self.dynamic else 'static1'}"


@dataclass(frozen=True)
class Row:
    """What came of a cell.

    Attributes:
        model: Zoo entry.
        preset: Policy.
        dynamic: Traced at batch 3 with symbolic axes and run at 1, 2 and 5; otherwise static at batch 1.
        status: ``ok``: the engine equals its oracle. ``refused``: an error that says why and what to do. ``skipped``:
            the library is not installed.
        max_rel_diff: Largest difference to the eager oracle over all outputs and shapes, as a share of their scale.
        nodes: Of the engine.
        sliced: Whether demand slicing found rows that nobody reads.
        reason: Of a refusal.
    """

    model: str
    preset: str
    dynamic: bool
    status: Literal["ok", "refused", "skipped"]
    max_rel_diff: float | None = None
    nodes: int | None = None
    sliced: bool | None = None
    reason: str | None = None


def presets(entry: ZooModel) -> list[str]:
    """Return the policies of a model: one that needs attention and a class token, or attention alone, among them."""
    scored = ["evit"] if entry.has_cls and entry.modality != "text" else ["power-bert", "evit"]
    return ["none", "tome", *scored, "uniform"]


def cases() -> list[Case]:
    """Return the whole matrix."""
    return [
        Case(entry.name, preset, dynamic)
        for entry in ZOO.values()
        for preset in presets(entry)
        for dynamic in (True, False)
    ]


def reduced(program: Program, preset: str) -> tuple[Program, Program, bool, Plan]:
    """Return the reduced program, the same with unread rows sliced away, whether there were any, and the plan."""
    plan = plan_for(program, preset)
    whole = Propagate(plan).run(program).program
    result = SliceDemand(plan.sites).run(whole)
    return whole, result.program, result.modified, plan


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the expected output's scale; infinite where shapes or non-numbers disagree."""
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return float("inf")
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-6))


def run_case(case: Case) -> Row:
    """Compile one cell and compare it; wrong numbers are for the caller to judge."""
    entry = ZOO[case.model]
    if missing := entry.available():
        return Row(case.model, case.preset, case.dynamic, "skipped", reason=missing)
    batch = TRACED_BATCH if case.dynamic else 1
    program = trace(entry.build(), entry.inputs(batch), entry.dynamic_shapes() if case.dynamic else None)
    try:
        whole, sliced, changed, _ = reduced(program, case.preset)
    except (PlanError, AxisError) as error:
        # A refusal is a result only when it is one that a user can act on.
        if not error.help:
            raise AssertionError(f"{case}: a refusal without help: {error}") from error
        reason = f"{type(error).__name__}: {error.what}; help: {error.help}"
        return Row(case.model, case.preset, case.dynamic, "refused", reason=reason)
    model = build_onnx(sliced)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(model, path)
        session = Session(path, threads=1)
    reference = oracle(whole)
    worst = 0.0
    for size in (1, 2, 5) if case.dynamic else (1,):
        length = _LENGTHS[size] if entry.has_length and case.dynamic else None
        inputs = entry.inputs(size, length, seed=size)
        names = [node.name for node in whole.user_inputs]
        expected = reference(dict(zip(names, inputs.values(), strict=True)))
        arrays = {name: value.numpy() for name, value in zip(names, inputs.values(), strict=True)}
        got = session.run(arrays)
        for name, want in zip(whole.output_names, expected, strict=True):
            found = torch.from_numpy(got[name])
            if found.shape != want.shape:
                worst = float("inf")
                continue
            worst = max(worst, relative_difference(*(entry.defined(name, x, inputs) for x in (found, want))))
    nodes = sum(1 for _ in model.graph.all_nodes())
    return Row(case.model, case.preset, case.dynamic, "ok", worst, nodes, changed)


def write_rows(rows: Sequence[Row], path: Path = RESULTS) -> None:
    """Write the matrix; cells that were skipped or not run here are kept from the file that is there."""
    cells = {Case(r["model"], r["preset"], r["dynamic"]): r for r in read_rows(path)} if path.is_file() else {}
    for row in rows:
        case = Case(row.model, row.preset, row.dynamic)
        if row.status == "skipped" and case in cells:
            continue
        cells[case] = asdict(row)
        if row.max_rel_diff is not None:
            cells[case]["max_rel_diff"] = float(f"{row.max_rel_diff:.2g}")
    made = [cells[case] for case in cases() if case in cells]
    head = {
        "what": "engine in ONNX Runtime against the eager oracle, fp32, tiny random-weight models of each architecture",
        "limit": LIMIT,
        "command": "python -m tests.zoo.matrix",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(cell) for cell in made)
    path.write_text(json.dumps(head)[:-1] + f', "rows": [\n  {lines}\n]}}\n', encoding="utf-8")


def read_rows(path: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the rows of a written matrix."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def main() -> int:
    """Run the matrix, or some models of it, and write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--models", nargs="*", default=list(ZOO), choices=list(ZOO))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for case in cases():
        if case.model not in options.models:
            continue
        row = run_case(case)
        rows.append(row)
        shown = f"{row.max_rel_diff:.1e}" if row.max_rel_diff is not None else row.reason
        print(f"{case!s:50} {row.status:8} {row.nodes or '':>5} {shown}", flush=True)
    if not options.dry_run:
        write_rows(rows, options.output)
    return int(any(row.max_rel_diff is not None and row.max_rel_diff > LIMIT for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
