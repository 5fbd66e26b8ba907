"""Filling the report: facts of the plan, and measurements of the engines."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import fx
from torch.export.graph_signature import OutputKind

from tokcc.analysis.ledger import Ledger, ledger
from tokcc.analysis.sizes import number
from tokcc.backends.feeds import Feeds
from tokcc.backends.ort import inserted_share
from tokcc.backends.parity import Check, computed_in, numpy_feeds
from tokcc.backends.sessions import AOTI, EngineSession, ending, open_engine
from tokcc.capture.loaded import Loaded
from tokcc.config import LoadedPolicy
from tokcc.ir.program import Program
from tokcc.passes.kept import kept_stages
from tokcc.passes.piece import scores_of
from tokcc.passes.plan import Plan
from tokcc.pipeline.reducing import Reduced
from tokcc.pipeline.stages import Stages
from tokcc.report.batches import InputSpec
from tokcc.report.data import CalibrationData, load_calibration
from tokcc.report.fidelity import Contract, FidelityMeter
from tokcc.report.kept import KeptTokens, patch_grid
from tokcc.report.machine import describe_machine
from tokcc.report.measure import Measured as Timed
from tokcc.report.measure import measure, timed_seconds
from tokcc.report.schema import (
    Fidelity,
    Latency,
    LayerRow,
    ModelFacts,
    NodeCounts,
    Parity,
    ParityCheck,
    PolicyFacts,
    Report,
    TensorFacts,
    Totals,
)

__all__ = [
    "Measurement",
    "facts",
    "fidelity_of",
    "kept_tokens",
    "latency_of",
    "measure_engine",
    "measure_further",
    "parity_checks",
    "runtime_of",
    "tensor_facts",
]

Array = npt.NDArray[Any]
_PICTURES = 6


@dataclass(frozen=True)
class Measurement:
    """How to measure, and what came out.

    Attributes:
        seed: Of the order of timed runs.
        threads: Of the runtime; 0 = its default.
        budget_s: Seconds for the timed rounds.
        report: With the measurements.
        images: Pixels of some samples, for pictures.
        texts: Tokens of some samples.
        kept: What became of the tokens of these samples.
    """

    seed: int = 0
    threads: int = 0
    budget_s: float = field(default_factory=timed_seconds)
    report: Report | None = None
    images: tuple[Array, ...] = ()
    texts: tuple[list[str], ...] = ()
    kept: tuple[KeptTokens, ...] = ()


def facts(
    loaded: Loaded,
    policy: LoadedPolicy,
    reduced: Reduced,
    checks: Mapping[str, Sequence[Check]],
    feeds: Sequence[Feeds],
    stages: Stages,
    *,
    threads: int,
) -> Report:
    """Return a report with everything that needs no measuring."""
    shapes = {name: tuple(value.shape) for name, value in feeds[0].items()}
    rows: tuple[LayerRow, ...] = ()
    totals = Totals.of(0, 0, shapes=shapes)
    warnings: tuple[str, ...] = ()
    notes: list[str] = list(reduced.sliced.notes)
    if reduced.sites is not None and reduced.plan is not None:
        before = ledger(reduced.original, reduced.sites, shapes)
        after = ledger(reduced.sliced, reduced.sites, shapes)
        rows = _rows(reduced, before, after, shapes)
        totals = Totals.of(before.total.flops, after.total.flops, shapes=shapes)
        warnings = reduced.plan.warnings
        notes += _full_attention(reduced) + _left_out(reduced)
    floats = [v for v in reduced.original.state_tensors().values() if v.is_floating_point()]
    parity = Parity(
        passed=all(c.passed for group in checks.values() for c in group),
        batches=len(feeds),
        inputs="example and random",
        checks=tuple(check for engine, group in checks.items() for check in parity_checks(engine, group)),
    )
    program = reduced.sliced
    report = Report(
        model=ModelFacts(
            source=loaded.source,
            kind=type(loaded.module).__name__ if loaded.module is not None else None,
            task=loaded.task,
            parameters=sum(v.numel() for v in floats),
            blocks=len(reduced.sites.layers) if reduced.sites is not None else 0,
            dtype=str(computed_in(reduced.original)).removeprefix("torch.") if floats else None,
            inputs=_inputs(reduced),
            outputs=_outputs(program),
        ),
        policy=PolicyFacts(name=policy.policy.name, origin=policy.origin, long_form=policy.policy.to_dict()),
        machine=describe_machine(threads),
        layers=rows,
        totals=totals,
        parity=parity,
        warnings=warnings,
        notes=tuple(notes),
        stages=dict(stages.seconds),
    )
    return report.noted(*_added(report))


def parity_checks(engine: str, checks: Sequence[Check]) -> tuple[ParityCheck, ...]:
    """Return the checks of an engine as parts of a report."""
    return tuple(ParityCheck(engine=engine, **asdict(check)) for check in checks)


def _is_tensor(node: Any) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def tensor_facts(program: Program, name: str, fake: torch.Tensor) -> TensorFacts:
    """Return name, type and shape of an input or output; dynamic sizes by name."""
    sizes: Sequence[Any] = fake.shape  # ints and SymInts; the stubs know ints only
    shape = tuple(size if isinstance(size, int) else program.size_name(size) for size in sizes)
    return TensorFacts(name=name, dtype=str(fake.dtype).removeprefix("torch."), shape=shape)


def _inputs(reduced: Reduced) -> tuple[TensorFacts, ...]:
    program = reduced.sliced
    added = reduced.added_inputs
    facts = [tensor_facts(program, program.public_name(n), n.meta["val"]) for n in program.user_inputs if _is_tensor(n)]
    return tuple(
        tensor.model_copy(update={"doc": added[tensor.name].doc, "unguided": added[tensor.name].unguided})
        if tensor.name in added
        else tensor
        for tensor in facts
    )


def _added(report: Report) -> list[str]:
    """Say what the engine reads besides the model's own inputs."""
    return [
        f"the engine reads `{tensor.name}` {tensor.dtype}[{', '.join(map(str, tensor.shape))}] besides the model's "
        f"own inputs: {tensor.doc}; {tensor.unguided:g} in all places = the method is not guided"
        for tensor in report.model.inputs
        if tensor.doc is not None
    ]


def _outputs(program: Program) -> tuple[TensorFacts, ...]:
    kinds = [spec.kind is OutputKind.USER_OUTPUT for spec in program.signature.output_specs]
    values = [v for v, user in zip(program.output_values, kinds, strict=True) if user]
    return tuple(
        tensor_facts(program, name, value.meta["val"])
        for name, value in zip(program.output_names, values, strict=True)
        if hasattr(value, "meta") and _is_tensor(value)
    )


def _rows(reduced: Reduced, before: Ledger, after: Ledger, shapes: Mapping[str, Sequence[int]]) -> tuple[LayerRow, ...]:
    assert reduced.sites is not None
    assert reduced.plan is not None
    bindings = reduced.sliced.bindings(shapes)
    current = _number(reduced.sites.tokens, bindings)
    rows: list[LayerRow] = []
    by_layer: dict[int, list[tuple[Any, Any]]] = {}
    for reduction, space in zip(reduced.plan.reductions, reduced.plan.made, strict=True):
        by_layer.setdefault(reduction.layer, []).append((reduction, space))
    sparse = {planned.layer: planned.name for planned in reduced.plan.sparse}
    for index in range(len(reduced.sites.layers)):
        cost = {
            "flops_before": before.blocks[index].flops,
            "flops_after": after.blocks[index].flops,
            "bytes_before": before.blocks[index].bytes,
            "bytes_after": after.blocks[index].bytes,
        }
        steps = by_layer.get(index, [])
        if not steps:
            place = {"site": "attention", "step": sparse[index]} if index in sparse else {}
            rows.append(LayerRow(layer=index, tokens_in=current, tokens_out=current, **place, **cost))
        for reduction, space in steps:
            left = _number(space.size, bindings)
            rows.append(
                LayerRow(
                    layer=index, site=reduction.site, step=reduction.name, tokens_in=current, tokens_out=left, **cost
                )
            )
            current = left
    return tuple(rows)


def _number(size: Any, bindings: Mapping[Any, int]) -> int:
    return number(size.meta["val"] if isinstance(size, fx.Node) else size, bindings)


def _full_attention(reduced: Reduced) -> list[str]:
    """Say where a score needs every row of the attention matrix."""
    assert reduced.plan is not None
    layers = sorted(
        {
            r.layer
            for r in reduced.plan.reductions
            if any(score.full_attention for score in scores_of(r.score, r.select))
        }
    )
    if not layers:
        return []
    where = ", ".join(map(str, layers))
    return [
        f"the score reads the whole attention matrix at layers {where}: in the ONNX engine it shares it with the "
        "attention, on a runtime with fused attention it costs one more"
    ]


def _left_out(reduced: Reduced) -> list[str]:
    """Say which reductions demand slicing took out: no token that they change is read, or they change none."""
    assert reduced.plan is not None
    present = {node.meta.get("tokcc") for node in reduced.sliced.graph.nodes}
    gone = sorted({r.layer for r in reduced.plan.reductions if f"{r.name}@{r.layer}" not in present})
    if not gone:
        return []
    where = ", ".join(map(str, gone))
    return [f"the reductions at layers {where} are not in the engine: no output depends on a token that they change"]


def measure_engine(
    report: Report,
    reduced: Reduced,
    loaded: Loaded,
    engine: Path,
    baseline: Path,
    feeds: Sequence[Feeds],
    calibration: Any,
    how: Measurement,
    stages: Stages,
) -> Measurement:
    """Measure fidelity and latency of an engine against its baseline.

    Args:
        report: The facts.
        reduced: The programs.
        loaded: The model, for its preprocessor and labels.
        engine: The reduced engine.
        baseline: The engine without reduction.
        feeds: Inputs for timing when there is no data.
        calibration: Data, or None.
        how: Seed, threads, budget.
        stages: Progress.
    """
    data: CalibrationData | None = None
    if calibration is not None:
        specs = [InputSpec(t.name, t.dtype, t.shape, t.unguided) for t in report.model.inputs]
        with stages.stage("read the calibration data"):
            data = load_calibration(
                calibration,
                specs,
                preprocessor=loaded.preprocessor,
                seed=how.seed,
                label_names=loaded.label_names,
                task=loaded.task,
            )
    one, two = open_engine(baseline, threads=how.threads), open_engine(engine, threads=how.threads)
    timed_feed = numpy_feeds(feeds[0])
    if data is not None:
        fidelity = fidelity_of(report, data, one, two, stages)
        report = report.noted(*data.notes).model_copy(update={"fidelity": fidelity})
        timed_feed = dict(next(iter(data.batches()))[0])
    shapes = {name: tuple(value.shape) for name, value in timed_feed.items()}
    with stages.stage("measure latency"):
        timed = measure(
            {"baseline": lambda: one.run(timed_feed), "engine": lambda: two.run(timed_feed)},
            budget_s=how.budget_s,
            seed=how.seed,
        )
        latency = latency_of(timed, timed_feed, how.threads, runtime_of(engine))
        inserted: float | None = None
        if ending(engine) != AOTI:  # which fuses inserted operations with others
            with tempfile.TemporaryDirectory(dir=engine.parent) as scratch:
                inserted = inserted_share(engine, timed_feed, Path(scratch), threads=how.threads)
    totals, rows = report.totals, report.layers
    if reduced.sites is not None and reduced.plan is not None:
        before = ledger(reduced.original, reduced.sites, shapes)
        after = ledger(reduced.sliced, reduced.sites, shapes)
        rows = _rows(reduced, before, after, shapes)
        totals = Totals.of(
            before.total.flops,
            after.total.flops,
            latency=latency,
            inserted_seconds=None if inserted is None else inserted * latency.engine.median,
            inserted_how=""
            if inserted is None
            else "share of the kernel time in onnxruntime's profile, times the median of the engine",
            shapes=shapes,
        )
    report = report.model_copy(
        update={
            "latency": latency,
            "layers": rows,
            "totals": totals,
            "nodes": None if ending(engine) == AOTI else NodeCounts(**_node_counts(baseline, engine)),
        }
    )
    images, texts, kept = _pictures(reduced, data)
    return replace(how, report=report, images=images, texts=texts, kept=kept)


def measure_further(
    measured: Measurement, backend: str, engine: Path, baseline: Path, feeds: Sequence[Feeds], stages: Stages
) -> Measurement:
    """Time one more engine against a baseline of its own, on the shapes of the first.

    Args:
        measured: The first engine's.
        backend: What made this one.
        engine: The engine.
        baseline: The same model without reduction, from the same backend.
        feeds: Inputs.
        stages: Progress.
    """
    report = measured.report
    assert report is not None
    assert report.latency is not None
    one, two = (open_engine(path, threads=measured.threads) for path in (baseline, engine))
    feed = numpy_feeds(next((f for f in feeds if _shapes(numpy_feeds(f)) == report.latency.shapes), feeds[0]))
    with stages.stage(f"measure latency of the {backend} engine"):
        timed = measure(
            {"baseline": lambda: one.run(feed), "engine": lambda: two.run(feed)},
            budget_s=measured.budget_s,
            seed=measured.seed,
        )
    latency = latency_of(timed, feed, measured.threads, runtime_of(engine))
    report = report.model_copy(update={"further": {**report.further, backend: latency}})
    return replace(measured, report=report)


def _shapes(feeds: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in feeds.items()}


def runtime_of(engine: Path | None = None) -> str:
    """Return what runs an engine, with its version; without one, what runs ONNX models."""
    if engine is not None and ending(engine) == AOTI:
        return f"torch {torch.__version__} AOTInductor CPU"
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"


def latency_of(timed: Timed, feeds: Mapping[str, Array], threads: int, runtime: str | None = None) -> Latency:
    """Return what was timed, with how it was measured."""
    shapes = _shapes(feeds)
    first = next((shape for shape in shapes.values() if shape), None)
    return timed.latency(
        "baseline",
        "engine",
        threads=threads,
        shapes=shapes,
        runtime=runtime or runtime_of(),
        batch_size=None if first is None else first[0],
    )


def _output_contracts(report: Report, names: Sequence[str]) -> dict[str, Contract]:
    """Return what the policy asked of each output."""
    wanted: Any = report.policy.long_form.get("outputs") or {}
    return {name: wanted.get(name, wanted.get("*", "full")) for name in names}


def _node_counts(baseline: Path, engine: Path) -> dict[str, Any]:
    counts: list[dict[str, int]] = []
    for path in (baseline, engine):
        model = onnx.load(str(path), load_external_data=False)
        found: dict[str, int] = {}
        for node in model.graph.node:
            found[node.op_type] = found.get(node.op_type, 0) + 1
        counts.append(found)
    one, two = counts
    kinds = sorted(one.keys() | two.keys())
    changed = {k: (one.get(k, 0), two.get(k, 0)) for k in kinds if one.get(k, 0) != two.get(k, 0)}
    return {"baseline": sum(one.values()), "engine": sum(two.values()), "by_op": changed}


def fidelity_of(
    report: Report, data: CalibrationData, one: EngineSession, two: EngineSession, stages: Stages
) -> Fidelity:
    """Compare two engines on data.

    Args:
        report: What the policy asked of the outputs.
        data: The samples.
        one: The baseline.
        two: The engine.
        stages: Progress.
    """
    meter = FidelityMeter(contracts=_output_contracts(report, one.outputs))
    with stages.stage("measure fidelity", len(data.feeds)) as advance:
        for feed, labels in data.batches():
            meter.update(
                one.run(feed),
                two.run(feed),
                labels=labels,
                tokens=feed.get("input_ids"),
                mask=feed.get("attention_mask"),
            )
            advance(1)
    return meter.result(source=data.source)


def _pictures(
    reduced: Reduced, data: CalibrationData | None
) -> tuple[tuple[Array, ...], tuple[list[str], ...], tuple[KeptTokens, ...]]:
    """Follow the tokens of the first samples through the layers."""
    if data is None or reduced.plan is None or not reduced.plan.reductions or not data.feeds:
        return (), (), ()
    if not data.images and not data.texts:
        return (), (), ()
    feeds = {name: torch.from_numpy(np.ascontiguousarray(value[:_PICTURES])) for name, value in data.feeds[0].items()}
    size = data.images[0].shape[:2] if data.images else None
    kept = kept_tokens(reduced.original, reduced.plan, feeds, size)
    images = tuple(data.images[:_PICTURES])
    texts = tuple(list(t) for t in data.texts[:_PICTURES])
    return images, texts, tuple(kept)


def kept_tokens(
    program: Program, plan: Plan, feeds: dict[str, torch.Tensor], size: tuple[int, ...] | None
) -> list[KeptTokens]:
    """Return what became of every token, reduction by reduction, in the form that the report draws.

    Args:
        program: The original program.
        plan: What is done to it.
        feeds: Inputs.
        size: Height and width of the pictures among them; None for text.
    """
    special = plan.sites.prefix + plan.sites.suffix
    # A class token between the patches is none of the grid's.
    middle = [] if plan.sites.middle is None else [plan.sites.middle]
    return [
        KeptTokens(
            layer=layer,
            step=name,
            kept=np.delete(kept, middle, axis=1),
            assign=None if assign is None else np.delete(assign, middle, axis=1),
            prefix=plan.sites.prefix,
            grid=None if size is None else patch_grid(kept.shape[1] - special - len(middle), *size),
        )
        for layer, name, kept, assign in kept_stages(program, plan, feeds)
    ]
