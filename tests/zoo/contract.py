"""The contract of the library: every preset on every architecture gives an engine that equals its eager oracle, or is
refused with a reason and something to do.

``python -m tests.zoo.contract`` writes ``benchmarks/results/contract_matrix.json`` again; ``--presets NAME ...``,
``--models NAME ...`` and ``--again refused`` run some cells and keep the others.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
import torch

from tests.decoders import mamba, tiny
from tests.zoo.arguments import PICTURE, PICTURE_ID, arguments
from tests.zoo.builders import HEADS, HIDDEN
from tests.zoo.contract_table import LIMIT, RESULTS, Case, Row, read_rows, write_rows
from tests.zoo.matrix import relative_difference
from tests.zoo.models import ZOO, ZooModel
from tests.zoo.trained import with_files
from tokcc.analysis.cache_sites import cache_sites
from tokcc.analysis.sites import find_sites
from tokcc.analysis.state_sites import state_sites
from tokcc.backends.aoti import callable_by_name, eager_runner
from tokcc.backends.calls import decoder_calls, lengths_past
from tokcc.backends.feeds import Feeds
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.backends.ort import Session
from tokcc.backends.parity import Tolerance, check_parity, numpy_feeds, oracle
from tokcc.config import LoadedPolicy, load_policy
from tokcc.errors import TokccError
from tokcc.ir.program import Program
from tokcc.lowering.aten import decompose
from tokcc.passes.inputs import random_values
from tokcc.passes.methods import library
from tokcc.pipeline.engines import Options, refuse_unable
from tokcc.pipeline.reducing import Reduced, reduce_program
from tokcc.pipeline.stages import Stages
from tokcc.testing import trace
from tools.presets_page import kind_of

__all__ = [
    "DECODERS",
    "DYNAMIC",
    "ENCODERS",
    "InAten",
    "cases",
    "compared",
    "decoder_feeds",
    "policy_for",
    "program_of",
    "refused",
    "run_case",
]

CROPS = 5
"""The static batch: a thumbnail and four crops, for the methods that take a batch as one image."""
TRACED, SIZES = 3, ((1, 21), (5, 30))
"""Dynamic: the batch while tracing, and batch and length of the runs."""
DYNAMIC = ("deit", "bert")
"""Models that every preset meets with symbolic axes too: an image, and a text with padding."""
SAME = ("torch_encoder_bnc_pre", "torch_encoder_nbc_post", "vit_classifier", "vit_eager")
"""Variants whose traits other models of the zoo have."""
ENCODERS = tuple(name for name, entry in ZOO.items() if name not in SAME and entry.family != "timm")
"""Of the zoo; timm's models are ViT and DeiT again, and need a library of their own."""
DECODERS = ("llama", "gpt2", "falcon")
"""Grouped heads and rotary positions; learned positions and single heads; one key head, attention beside the MLP."""
TRAINED = {"dma": ("doge",), "hisa": ("deepseek-v32",)}
"""Decoders that were trained with a method, beside those that every method meets."""
STATE_SPACE = ("mamba",)
"""Decoders without attention."""
MODELS = (*ENCODERS, *DECODERS, *(name for names in TRAINED.values() for name in names), *STATE_SPACE)


def cases(presets: Sequence[str] | None = None) -> list[Case]:
    """Return the cells of some presets, by default of all: each on all models of its kind."""
    found: list[Case] = []
    for name, preset in library().items():
        if presets is not None and name not in presets:
            continue
        if kind_of(preset) != "encoder":
            families = STATE_SPACE if kind_of(preset) == "scan" else (*DECODERS, *TRAINED.get(name, ()))
            found += [Case(name, family) for family in families]
            continue
        found += [Case(name, model) for model in ENCODERS]
        found += [Case(name, model, dynamic=True) for model in DYNAMIC]
    # A model is captured once, and cells that share it stand together.
    return sorted(found, key=lambda case: (MODELS.index(case.model), case.dynamic, case.preset))


@cache
def program_of(model: str, dynamic: bool = False) -> Program:
    """Capture a model, once in a process."""
    if model in tiny.FAMILIES:
        return tiny.program_of(model)
    if model in STATE_SPACE:
        return mamba.program()
    entry = ZOO[model]
    return trace(entry.build(), entry.inputs(TRACED if dynamic else CROPS), entry.dynamic_shapes() if dynamic else None)


def policy_for(case: Case, folder: Path) -> LoadedPolicy:
    """Return a policy of the preset alone, with arguments for tiny models and random weights in a folder."""
    sizes, tokens = _facts(case.model, case.dynamic)
    step = with_files(arguments(case.preset), sizes, tokens, folder)
    policy: dict[str, Any] = {"version": 1, "name": case.preset, "steps": [step]}
    if any(own.get("protect", {}).get("segment") for own in library()[case.preset].steps):
        policy["segments"] = {"image": {"input_ids": PICTURE_ID, "tokens": PICTURE}}
    return load_policy(policy, presets=library())


@cache
def _facts(model: str, dynamic: bool) -> tuple[dict[str, int], int]:
    """What trained pieces may count on, and the number of candidates while tracing."""
    program = program_of(model, dynamic)
    if model in STATE_SPACE:
        sites = state_sites(program)
        return {"layers": len(sites), "channels": sites[0].channels}, 0
    if model not in ZOO:
        sites = cache_sites(program)
        nodes = {node.name: node for node in program.graph.nodes}
        query, key = (nodes[name].meta["val"].shape for name in (sites[0].query, sites[0].new_key))
        heads = {"query_heads": int(query[1]), "heads": int(key[1]), "head_width": int(key[3])}
        return {"layers": len(sites), **heads}, 0
    sites = find_sites(program)
    first = sites.cut(0, "block_output")
    width = int(sites.axes[first].old[-1]) if first in sites.axes else HIDDEN
    sizes = {"C": width, "heads": HEADS, "head_width": width // HEADS, "layers": len(sites.layers)}
    return sizes, ZOO[model].tokens - sites.prefix - sites.suffix


class Runs(Protocol):
    """What is made of a reduced program."""

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run once."""


def onnx_engine(reduced: Reduced, folder: Path) -> Runs:
    """Lower to ONNX."""
    path = folder / "model.onnx"
    save_onnx(build_onnx(reduced.sliced), path)
    return Session(path, threads=1, patterns=False)


class InAten:
    """The program in aten operations: what AOTInductor would compile, run by torch."""

    def __init__(self, reduced: Reduced, folder: Path) -> None:
        refuse_unable(reduced, load_policy("none", presets=library()), Options(backends=("aoti",)), {})
        self._program = reduced.sliced
        self._made = decompose(self._program)
        self._run: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run once."""
        if self._run is None:
            example = {name: torch.as_tensor(value) for name, value in feeds.items()}
            self._run = eager_runner(self._program, callable_by_name(self._program, self._made, example))
        return self._run(feeds)


def run_case(case: Case, engine: Callable[[Reduced, Path], Runs] = onnx_engine) -> Row:
    """Reduce, slice, lower, run and compare one cell.

    Args:
        case: The cell.
        engine: Makes what is compared with the oracle; what it refuses is a refusal of the cell.
    """
    entry = ZOO.get(case.model)
    if entry is not None and (missing := entry.available()):
        return Row(case, "skipped", reason=missing)
    program = program_of(case.model, case.dynamic)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            policy = policy_for(case, folder)
            reduced = reduce_program(program, policy, Stages())
            if not _acts(reduced):
                return Row(case, "failed", reason="nothing is reduced: give the preset other arguments in arguments.py")
            session = engine(reduced, folder)
        except TokccError as error:
            return refused(case, error)
        return compared(case, reduced, session)


def compared(case: Case, reduced: Reduced, session: Runs, calls: Calls | None = None) -> Row:
    """Hold an engine against its oracle; a decoder on some calls only where its engine is made for some."""
    entry = ZOO.get(case.model)
    if entry is None:
        return _compare_decoder(case, reduced, session, calls or decoder_feeds(reduced))
    return _compare_encoder(case, entry, reduced, session)


def refused(case: Case, error: TokccError) -> Row:
    """A refusal is a result when it says what is wrong and what to do."""
    reason = f"{type(error).__name__}: {error.what}"
    if not (error.help or "").strip():
        return Row(case, "failed", reason=f"a refusal without help: {error}")
    return Row(case, "refused", reason=f"{reason}; help: {error.help}")


def _acts(reduced: Reduced) -> bool:
    """Whether the policy did anything: a cell that compares a model with itself says nothing."""
    if reduced.caches is not None:
        return reduced.caches.changes
    if reduced.scans is not None:
        return bool(reduced.scans.filters)
    assert reduced.plan is not None
    plan = reduced.plan
    # What passes a layer by leaves no reduced tokens behind.
    bypassed = any(planned.reduce.bypasses for planned in plan.reductions)
    return bool(plan.sparse) or bypassed or any(space.reduced for space in plan.made)


def _compare_encoder(case: Case, entry: ZooModel, reduced: Reduced, session: Runs) -> Row:
    reference, names = oracle(reduced.program), reduced.program.output_names
    generator = torch.Generator().manual_seed(0)
    worst, wrong = 0.0, []
    for batch, length in SIZES if case.dynamic else ((CROPS, None),):
        feeds = entry.inputs(batch, length if entry.has_length else None, seed=batch)
        given = {**feeds, **random_values(reduced.program, reduced.declared_inputs, feeds, generator)}
        expected = reference(given)
        got = session.run(numpy_feeds(given))
        for name, want in zip(names, expected, strict=True):
            found = torch.from_numpy(got[name])
            difference = _difference(entry, name, found, want, feeds)
            if not difference <= LIMIT:
                wrong.append(f"`{name}` at batch {batch}: {difference:.2g}")
            worst = max(worst, difference)
    return _judged(case, worst, wrong)


def _difference(entry: ZooModel, name: str, found: torch.Tensor, want: torch.Tensor, feeds: Feeds) -> float:
    """Largest difference as a share of the output's scale, where the output is defined; infinite for other shapes."""
    if found.shape != want.shape or found.dtype != want.dtype:
        return float("inf")
    valid = entry.valid_rows(feeds)
    if valid is not None and name in entry.token_outputs and want.movedim(entry.batch_axis, 0).shape[:2] == valid.shape:
        found, want = (entry.defined(name, value, feeds) for value in (found, want))
    if not want.is_floating_point():
        return 0.0 if torch.equal(found, want) else float("inf")
    return relative_difference(found, want) if bool(want.isfinite().all()) else float("inf")


Calls = tuple[Sequence[Feeds], Sequence[Sequence[torch.Tensor]]]


def decoder_feeds(reduced: Reduced) -> Calls:
    """Return call after call: a prompt of padded rows, single tokens, a second text, more single tokens."""
    plan, scans = reduced.caches, reduced.scans
    return decoder_calls(
        reduced.program,
        _example(reduced.original),
        oracle(reduced.program),
        lengths=lengths_past(0 if plan is None else plan.waits),
        added=reduced.declared_inputs,
        prompt=None if plan is None else plan.prompt,
        before=0 if scans is None else scans.before,
    )


def _compare_decoder(case: Case, reduced: Reduced, session: Runs, calls: Calls) -> Row:
    feeds, expected = calls
    checks = check_parity(session.run, reduced.program.output_names, feeds, expected, Tolerance())
    wrong = [f"`{check.output}`: {check.max_abs_diff:.2g} of {check.scale:.2g}" for check in checks if not check.passed]
    worst = max(check.max_abs_diff / max(check.scale, 1e-6) for check in checks if check.output == "logits")
    return _judged(case, worst, wrong)


def _example(program: Program) -> Feeds:
    """Inputs whose largest token bounds random ones."""
    tokens = torch.full([2, 4], tiny.VOCABULARY - 1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "position_ids": torch.zeros_like(tokens)}


def _judged(case: Case, worst: float, wrong: Sequence[str]) -> Row:
    if wrong:
        return Row(case, "failed", reason=f"the engine differs from the oracle: {', '.join(wrong)}")
    return Row(case, "ok", max_rel_diff=worst)


def attempt(case: Case, run: Callable[[Case], Row] = run_case) -> Row:
    """Run a cell of the whole matrix, where one that breaks must not hide the others."""
    try:
        return run(case)
    except Exception as error:  # the row says it, and the table's test fails
        return Row(case, "failed", reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def main() -> int:
    """Run the matrix, or some presets or models of it, and write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--presets", nargs="*", choices=list(library()))
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--again", nargs="*", help="only cells that are so in the file: refused, failed")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = {row.case: row.status for row in read_rows(options.output)} if options.output.is_file() else {}
    wanted = [c for c in cases(options.presets) if options.again is None or known.get(c) in options.again]
    rows: list[Row] = []
    begun = time.process_time()
    for model in options.models:  # one by one, so that few captured programs are alive
        for case in (case for case in wanted if case.model == model):
            start = time.process_time()
            row = attempt(case)
            rows.append(row)
            shown = f"{row.max_rel_diff:.1e}" if row.max_rel_diff is not None else row.reason
            print(f"{case!s:55} {row.status:8} {time.process_time() - start:5.1f} s  {shown}", flush=True)
        program_of.cache_clear()
        if not options.dry_run:
            write_rows(rows, cases(), options.output)
    print(f"{len(rows)} cells in {time.process_time() - begun:.0f} s of one core")
    return int(any(row.status == "failed" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
