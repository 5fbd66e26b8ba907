"""Every preset as a TensorRT graph: equal to the eager oracle in ONNX Runtime, and built by TensorRT for RTX on the
CPU, or refused with a reason and something to do.

``python -m tests.zoo.tensorrt`` writes ``benchmarks/results/tensorrt_matrix.json`` again; ``--presets NAME ...`` and
``--again failed`` run some cells and keep the others.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.tensorrt.rtx import TARGETS, build
from tests.zoo import contract
from tests.zoo.contract_table import HEAD, Case, Row, read_rows, write_rows
from tokcc.backends.ort import Session
from tokcc.backends.tensorrt.folder import CHECKED_WITH
from tokcc.backends.tensorrt.graph import lower
from tokcc.backends.tensorrt.profiles import Profile, Shapes, make_profiles
from tokcc.errors import TokccError
from tokcc.passes.methods import library
from tokcc.pipeline.reducing import Reduced, reduce_program
from tokcc.pipeline.stages import Stages
from tokcc.pipeline.tensorrt import calls_within, write_graph

__all__ = ["RESULTS", "cases", "run_case"]

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "tensorrt_matrix.json"
_HEAD = {
    **HEAD,
    "what": "the graph for TensorRT in ONNX Runtime against the eager oracle, fp32, tiny random-weight models; where "
    f"equal, an engine for compute capabilities {', '.join(TARGETS)} was built from it with {CHECKED_WITH} on a CPU, "
    "and not run",
    "command": "python -m tests.zoo.tensorrt",
}
_ORDER = (("deit", True), ("bert", True), ("vit", False), ("clip_vision", False))
"""Encoders in the order in which a preset is tried: the first one that takes it stands for its kind."""


def cases(presets: Sequence[str] | None = None) -> list[Case]:
    """Return one cell for each preset: a model that its contract holds on."""
    works = {(row.case.preset, row.case.model, row.case.dynamic) for row in read_rows() if row.status == "ok"}
    found = []
    for case in contract.cases(presets):
        found.append(case) if (case.preset, case.model, case.dynamic) in works else None
    best: dict[str, Case] = {}
    for case in found:
        if case.preset not in best or _rank(case) < _rank(best[case.preset]):
            best[case.preset] = case
    return [best[name] for name in library() if name in best]


def _rank(case: Case) -> int:
    key = (case.model, case.dynamic)
    return _ORDER.index(key) if key in _ORDER else len(_ORDER) + (case.model not in contract.DECODERS)


@dataclass(frozen=True)
class Side:
    """Calls that an engine is made for: smallest, usual and largest number of new tokens and of all tokens."""

    new: tuple[int, int, int]
    text: tuple[int, int, int]


def sides(reduced: Reduced) -> tuple[Side, ...]:
    """Return what a decoder may be built for: all calls; else whole prompts; else single tokens of long texts."""
    plan = reduced.caches
    least = 1 if plan is None or plan.prompt is None else plan.prompt.shortest + 1
    every = Side((least, least + 12, least + 24), (least, least + 24, least + 40))
    prompts = (least + 40, least + 60, least + 80)
    return every, Side(prompts, prompts), Side((1, 1, 1), (80, 100, 120))


def shapes_of(reduced: Reduced, side: Side | None = None) -> Shapes:
    """Return shapes for all inputs but caches."""
    named = {"batch": (1, 2, 4)}
    found: dict[str, Any] = {}
    for node in reduced.sliced.user_inputs:
        fake, name = node.meta.get("val"), reduced.sliced.public_name(node)
        if not isinstance(fake, torch.Tensor) or name.startswith("past_key_values."):
            continue
        usual = (8, 20, 32) if side is None else side.text if name == "attention_mask" else side.new
        if side is not None and name in reduced.added_inputs:
            usual = (
                max(side.new[0] // 4, 1),
                max(side.new[1] // 2, 1),
                side.new[2],
            )  # texts that go along with a prompt
        three = [
            (size,) * 3 if isinstance(size, int) else named.setdefault(reduced.sliced.size_name(size), usual)
            for size in fake.shape
        ]
        found[name] = tuple(zip(*three, strict=True)) if three else ((), (), ())
    return found


def run_case(case: Case) -> Row:
    """Reduce, lower for TensorRT, run in ONNX Runtime, compare, and build an engine."""
    program = contract.program_of(case.model, case.dynamic)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = contract.policy_for(case, folder)
        reduced = reduce_program(program, policy, Stages())
        refused: Row | None = None
        for number, side in enumerate((None,) if reduced.caches is None else sides(reduced)):
            place = folder / str(number)
            try:
                profiles = make_profiles(reduced.sliced, {}, shapes_of(reduced, side))
                lowered = lower(reduced.sliced, profiles, policy).legal(policy)
                write_graph(place, "model", reduced, policy, lowered)
            except TokccError as error:
                refused = refused or contract.refused(case, error)
                continue
            return _built(case, reduced, profiles, place)
    assert refused is not None
    return refused


def _built(case: Case, reduced: Reduced, profiles: Sequence[Profile], folder: Path) -> Row:
    calls = None
    if reduced.caches is not None:
        calls = calls_within(reduced, reduced.program, profiles, *contract.decoder_feeds(reduced), 0)
    row = contract.compared(case, reduced, Session(folder / "model.onnx", threads=1, patterns=False), calls)
    made = build(folder) if row.status == "ok" else {"ok": True}
    return row if made["ok"] else Row(case, "failed", reason=f"the builder refuses it: {made['error'][:400]}")


def main() -> int:
    """Run the matrix, or some presets of it, and write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--presets", nargs="*", choices=list(library()))
    parser.add_argument("--again", nargs="*", help="only cells that are so in the file: refused, failed")
    parser.add_argument("--new", action="store_true", help="only cells that are not in the file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = {row.case: row.status for row in read_rows(options.output)} if options.output.is_file() else {}
    wanted = [case for case in cases(options.presets) if options.again is None or known.get(case) in options.again]
    wanted = [case for case in wanted if not options.new or case not in known]
    wanted.sort(key=lambda case: (case.model, case.preset))
    failed = 0
    for case in wanted:
        start = time.perf_counter()
        row = contract.attempt(case, run_case)
        failed += row.status == "failed"
        shown = f"{row.max_rel_diff:.1e}" if row.max_rel_diff is not None else row.reason
        print(f"{case!s:45} {row.status:8} {time.perf_counter() - start:5.1f} s  {shown}", flush=True)
        write_rows([row], cases(), options.output, _HEAD)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
