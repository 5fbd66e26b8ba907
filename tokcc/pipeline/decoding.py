"""Filling the report of a decoder: what its caches hold, and how fast it generates at several lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokcc.analysis.ledger import node_flops
from tokcc.backends.feeds import Feeds
from tokcc.backends.ort import Session
from tokcc.backends.parity import oracle
from tokcc.ir.program import Program
from tokcc.pipeline.measuring import Measurement, latency_of
from tokcc.pipeline.reducing import Reduced
from tokcc.pipeline.stages import Stages
from tokcc.report.measure import measure
from tokcc.report.schema import BreakEvenPoint, LayerRow, Report, Totals

__all__ = ["cache_facts", "measure_decoder"]

Array = npt.NDArray[Any]
Sizes = dict[str, tuple[int, ...]]
Run = Callable[[Feeds], list[torch.Tensor]]
aten = torch.ops.aten
_CONTEXTS = (512, 1024, 2048, 4096)
_PAST, _PRESENT = "past_key_values.", "present."


@dataclass(frozen=True)
class _Step:
    """One step of a generation.

    Attributes:
        context: Tokens before it.
        feeds: Inputs.
    """

    context: int
    feeds: dict[str, Array]

    @property
    def shapes(self) -> Sizes:
        """Shapes of the inputs."""
        return {name: tuple(value.shape) for name, value in self.feeds.items()}


def cache_facts(report: Report, reduced: Reduced) -> Report:
    """Add what each layer's cache holds at the longest context that is looked at, and the FLOPs of a step there."""
    assert reduced.caches is not None
    context = _contexts(reduced.program)[-1]
    before = _step(reduced.original, oracle(reduced.original), context)
    after = _step(reduced.program, oracle(reduced.program), context)
    rows = []
    plan = reduced.caches
    flops = [
        _attention_flops(program, step.shapes)
        for program, step in ((reduced.original, before), (reduced.program, after))
    ]
    for site in plan.sites:
        eviction = plan.evictions.get(site.layer)
        sizes = [_layer_bytes(step.feeds, site.layer) for step in (before, after)]
        slots = [step.feeds[f"{_PAST}{site.layer}.key"].shape[2] for step in (before, after)]
        rows.append(
            LayerRow(
                layer=site.layer,
                site="cache" if eviction else "",
                step=eviction.name if eviction else "",
                tokens_in=slots[0],
                tokens_out=slots[1],
                flops_before=flops[0][site.layer],
                flops_after=flops[1][site.layer],
                bytes_before=sizes[0],
                bytes_after=sizes[1],
                kv_bytes_before=sizes[0],
                kv_bytes_after=sizes[1],
            )
        )
    total = [
        _total_flops(program, step.shapes) for program, step in ((reduced.original, before), (reduced.program, after))
    ]
    held = [sum(getattr(row, name) or 0 for row in rows) for name in ("kv_bytes_before", "kv_bytes_after")]
    notes = (
        f"per layer: slots and bytes of the cache, and FLOPs of the attention over it, one token after {context}",
        f"after {context} tokens the caches hold {held[1] / 1e6:.1f} MB a sequence, whole ones {held[0] / 1e6:.1f} MB",
    )
    return report.model_copy(
        update={
            "layers": tuple(rows),
            "totals": Totals.of(total[0], total[1], shapes=after.shapes),
            "notes": (*report.notes, *notes),
            "warnings": (*report.warnings, *plan.warnings),
            "model": report.model.model_copy(update={"blocks": len(plan.sites)}),
        }
    )


def measure_decoder(
    report: Report, reduced: Reduced, engine: Path, baseline: Path, how: Measurement, stages: Stages
) -> Measurement:
    """Time single steps of a generation at several lengths, engine and whole cache in turns.

    Args:
        report: The facts.
        reduced: The programs.
        engine: The engine.
        baseline: The engine that keeps everything.
        how: Seed, threads, budget.
        stages: Progress.
    """
    one, two = Session(baseline, threads=how.threads), Session(engine, threads=how.threads)
    points: list[BreakEvenPoint] = []
    contexts = _contexts(reduced.program)
    latency = None
    whole, reference = oracle(reduced.original), oracle(reduced.program)
    with stages.stage("measure decoding", len(contexts)) as advance:
        for context in contexts:
            before = _step(reduced.original, whole, context)
            after = _step(reduced.program, reference, context)
            timed = measure(
                {"baseline": lambda a=before: one.run(a.feeds), "engine": lambda b=after: two.run(b.feeds)},  # type: ignore[misc]
                budget_s=how.budget_s / len(contexts),
                seed=how.seed,
            )
            latency = latency_of(timed, after.feeds, how.threads)
            points.append(
                BreakEvenPoint(
                    shapes=after.shapes,
                    label=f"one token after {context}",
                    tokens=context,
                    ratio=latency.speedup,
                    runs=latency.runs,
                )
            )
            advance(1)
    known = report.totals  # of the longest context, which was timed last
    totals = Totals.of(known.flops_before, known.flops_after, latency=latency, shapes=known.shapes)
    report = report.model_copy(update={"latency": latency, "totals": totals, "break_even": tuple(points)})
    return replace(how, report=report)


def _contexts(program: Program) -> tuple[int, ...]:
    """Return the lengths to look at: none longer than the model's table of positions."""
    limit = _positions(program)
    return tuple(c for c in _CONTEXTS if limit is None or c < limit) or (max((limit or 2) - 1, 1),)


def _positions(program: Program) -> int | None:
    """Return how many learned positions there are, or None."""
    for node in program.user_inputs:
        if "position" not in node.name:
            continue
        for user in node.users:
            table = user.args[0] if user.args else None
            if user.target is aten.embedding.default and hasattr(table, "meta"):
                return int(table.meta["val"].shape[0])  # type: ignore[union-attr]  # a node
    return None


def _step(program: Program, run: Run, context: int) -> _Step:
    """Return the inputs of a single token after a context: caches as long as the program leaves them."""
    rng = np.random.default_rng(0)
    lengths = _lengths(program, run, context)
    feeds: dict[str, Array] = {}
    for node in program.user_inputs:
        name, fake = program.public_name(node), node.meta["val"]
        if name.startswith(_PAST):
            shape = (1, int(fake.shape[1]), lengths[name], int(fake.shape[3]))
            feeds[name] = rng.standard_normal(shape).astype(np.float32) * np.float32(0.1)
        else:
            feeds[name] = _plain(name, context, 1)
        feeds[name] = feeds[name].astype(str(fake.dtype).removeprefix("torch."))
    return _Step(context, feeds)


def _plain(name: str, context: int, new: int) -> Array:
    if "mask" in name:
        return np.ones((1, context + new), np.int64)
    if "position" in name:
        return np.arange(context, context + new)[None]
    return np.ones((1, new), np.int64)


def _lengths(program: Program, run: Run, context: int) -> dict[str, int]:
    """Return how long each cache is after a context: from the program itself, run with a whole cache and two tokens."""
    new = 2
    feeds: dict[str, torch.Tensor] = {}
    for node in program.user_inputs:
        name, fake = program.public_name(node), node.meta["val"]
        if name.startswith(_PAST):
            shape = (1, fake.shape[1], context - new, fake.shape[3])
            feeds[name] = torch.zeros(shape, dtype=fake.dtype)
        else:
            feeds[name] = torch.from_numpy(_plain(name, context - new, new)).to(fake.dtype)
    outputs = run(feeds)
    return {
        name.replace(_PRESENT, _PAST): int(value.shape[2])
        for name, value in zip(program.output_names, outputs, strict=True)
        if name.startswith(_PRESENT)
    }


def _layer_bytes(feeds: Mapping[str, Array], layer: int) -> int:
    prefix = f"{_PAST}{layer}."
    return sum(value.nbytes for name, value in feeds.items() if name.startswith(prefix))


def _attention_flops(program: Program, shapes: Mapping[str, Sequence[int]]) -> list[int]:
    bindings = program.bindings(shapes)
    op = torch.ops.tokcc.cached_attention.default
    return [node_flops(node, bindings) for node in program.graph.nodes if node.target is op]


def _total_flops(program: Program, shapes: Mapping[str, Sequence[int]]) -> int:
    bindings = program.bindings(shapes)
    return sum(node_flops(node, bindings) for node in program.graph.nodes if node.op == "call_function")
