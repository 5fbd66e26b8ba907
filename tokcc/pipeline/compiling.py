"""``tokcc compile``: the main job, as a table of contents."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.export import ExportedProgram

import tokcc
from tokcc.backends.bundle import BackendEntry, BundleWriter, Manifest, TensorContract
from tokcc.backends.calls import check_rebuilt, decoder_calls, lengths_past
from tokcc.backends.feeds import Feeds, example_feeds, make_feeds
from tokcc.backends.genai_config import save_genai_config
from tokcc.backends.generation.decoder import TOKEN_BYTES
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.backends.ort import Session
from tokcc.backends.parity import Check, Tolerance, check_parity, oracle, refuse_difference
from tokcc.backends.pt2 import save_pt2
from tokcc.backends.reference import save_reference
from tokcc.backends.runtime_files import save_runtime_files
from tokcc.capture.loaded import Loaded
from tokcc.config import LoadedPolicy, Policy, load_policy
from tokcc.errors import LoweringError, OutputError, UsageError
from tokcc.ir.program import Program
from tokcc.passes.methods import library
from tokcc.pipeline.decoding import cache_facts, measure_decoder, read_text
from tokcc.pipeline.measuring import Measurement, facts, measure_engine
from tokcc.pipeline.reducing import Reduced, reduce_program
from tokcc.pipeline.request import ModelRequest
from tokcc.pipeline.stages import Stages
from tokcc.progress import Progress, silent
from tokcc.report.gates import evaluate_gates, parse_gates
from tokcc.report.schema import Report
from tokcc.report.tokens import TokenText
from tokcc.report.write import write_report

__all__ = ["DryRun", "compile", "reduce"]

_BACKENDS = ("onnx", "pt2")


@dataclass(frozen=True)
class DryRun:
    """What a compile would do."""

    plan: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return self.plan


def compile(
    model: Any,
    policy: str | Path | Mapping[str, Any] | Policy,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    backends: Sequence[str] = ("onnx",),
    output: str | Path | None = None,
    calibration: Any = None,
    gates: Any = None,
    inputs: Sequence[str] = (),
    dynamic: Sequence[str] = (),
    opset: int = 18,
    dtype: str | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    task: str | None = None,
    force: bool = False,
    seed: int = 0,
    allow_pickle: bool = False,
    calibrate: bool = True,
    keep_baseline: bool = False,
    slicing: bool = True,
    threads: int = 0,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Compile a model with a policy into a bundle.

    Args:
        model: An ``nn.Module``, an ``ExportedProgram``, or anything the command line takes.
        policy: A policy file, a preset's name, ``none``, a dict, or a policy.
        example_inputs: Tuple or dict of tensors; archives and Hugging Face folders bring their own.
        dynamic_shapes: As for ``torch.export.export``.
        backends: Engines to write: ``onnx``, ``pt2``.
        output: The bundle's folder.
        calibration: Data to measure on; without it random inputs are timed.
        gates: Conditions such as ``{"cosine": ">=0.98"}`` or ``["speedup>=1.2"]``.
        inputs: ``NAME=DTYPE[dims]`` where the model brings no inputs.
        dynamic: ``NAME:AXIS=MIN..MAX``.
        opset: ONNX opset.
        dtype: Floating-point type to cast the model to.
        atol: Absolute tolerance of the parity check; default by dtype and scale.
        rtol: Relative tolerance of the parity check.
        task: Task of a Hugging Face model.
        force: Replace an existing bundle.
        seed: Of random inputs and of the order of timed runs.
        allow_pickle: Load pickled modules.
        calibrate: Measure latency and fidelity.
        keep_baseline: Keep the engine without reduction in the bundle.
        slicing: Compute only what the outputs need.
        threads: Threads of the runtime while measuring; 0 = its default.
        dry_run: Stop after planning; returns a :class:`DryRun`.
        progress: Receives the stages.

    Returns:
        The bundle. A missed gate does not raise: ``bundle.manifest.state`` says so.

    Raises:
        TokccError: One of its kinds, by stage.
    """
    _check_backends(backends)
    stages = Stages(progress or silent())
    wanted = parse_gates(gates or ())
    chosen = load_policy(policy, presets=library())
    request = ModelRequest(
        model,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        inputs=inputs,
        dynamic=dynamic,
        task=task,
        dtype=dtype,
        allow_pickle=allow_pickle,
    )
    if dry_run:
        return _dry_run(request, chosen, stages)
    if output is None:
        raise UsageError("no output folder is given", help='for instance `output="out/"`')
    with BundleWriter(output, force=force) as writer:
        loaded, program = request.open(stages)
        reduced = reduce_program(program, chosen, stages, slicing=slicing)
        remarks = save_runtime_files(loaded, writer.path)
        text: TokenText | None = None
        if reduced.caches is not None and calibrate and calibration is not None:
            with stages.stage("read the calibration data"):
                text = read_text(calibration, writer.path, plan=reduced.caches)
        feeds, expected = _reference(program, reduced, _examples(program, loaded), seed, stages)
        engine, checks = _emit(writer, reduced, chosen, backends, opset, feeds, expected, Tolerance(atol, rtol), stages)
        measurement = Measurement(seed=seed, threads=threads)
        report = facts(loaded, chosen, reduced, checks, feeds, stages, threads=threads)
        if reduced.caches is not None and reduced.caches.fixed and engine is not None:
            remarks += save_genai_config(loaded, reduced.sliced, engine.name, writer.path)
        report = report.model_copy(update={"notes": (*report.notes, *remarks)})
        if engine is not None:
            baseline = _baseline(writer, reduced, opset, stages, keep_baseline, needed=calibrate)
            if calibrate and baseline is not None:
                if reduced.caches is None:
                    measurement = measure_engine(
                        report, reduced, loaded, engine, baseline, feeds, calibration, measurement, stages
                    )
                else:
                    measurement = measure_decoder(report, reduced, loaded, engine, baseline, text, measurement, stages)
            if baseline is not None and not keep_baseline:
                baseline.unlink(missing_ok=True)
                baseline.with_name(baseline.name + ".data").unlink(missing_ok=True)
        if measurement.report is not None:
            report = measurement.report
        elif reduced.caches is not None:
            report = cache_facts(report, reduced, loaded)
        report = report.model_copy(update={"stages": dict(stages.seconds)})
        report = report.model_copy(update={"gates": tuple(evaluate_gates(report, wanted))})
        with stages.stage("write the report"):
            report = write_report(
                report,
                writer.path,
                images=measurement.images,
                texts=measurement.texts,
                stages=measurement.kept,
                bundle=str(output),
            )
        return writer.commit(_manifest(loaded, chosen, reduced, report, backends, opset, feeds[0]))


def reduce(
    model: Any,
    policy: str | Path | Mapping[str, Any] | Policy,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    inputs: Sequence[str] = (),
    dynamic: Sequence[str] = (),
    dtype: str | None = None,
    task: str | None = None,
    allow_pickle: bool = False,
    slicing: bool = False,
) -> ExportedProgram:
    """Return the reduced program with ``tokcc::`` nodes: the eager oracle. Arguments as for :func:`compile`."""
    request = ModelRequest(
        model,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        inputs=inputs,
        dynamic=dynamic,
        task=task,
        dtype=dtype,
        allow_pickle=allow_pickle,
    )
    stages = Stages()
    _, program = request.open(stages)
    reduced = reduce_program(program, load_policy(policy, presets=library()), stages, slicing=slicing)
    return reduced.sliced.to_exported()


def _check_backends(backends: Sequence[str]) -> None:
    if not backends:
        raise UsageError("no backend is chosen", needed="one of " + ", ".join(_BACKENDS))
    for name in backends:
        if name not in _BACKENDS:
            raise LoweringError(
                f"backend `{name}` is not available in this version of tokcc", needed="one of " + ", ".join(_BACKENDS)
            )


def _dry_run(request: ModelRequest, policy: LoadedPolicy, stages: Stages) -> DryRun:
    loaded, program = request.open(stages)
    reduced = reduce_program(program, policy, stages)
    report = facts(loaded, policy, reduced, {}, [_examples(program, loaded)], stages, threads=0)
    if reduced.caches is not None:
        report = cache_facts(report, reduced, loaded)
    layers = [
        row.model_dump(include={"layer", "site", "step", "tokens_in", "tokens_out"})
        for row in report.layers
        if row.step
    ]
    return DryRun(
        {
            "policy": report.policy.name,
            "layers": layers,
            "ideal_speedup": report.totals.ideal_speedup,
            "warnings": list(report.warnings),
            "notes": list(report.notes),
        }
    )


def _examples(program: Program, loaded: Loaded) -> Feeds:
    return example_feeds(program, loaded.example_args, loaded.example_kwargs)


def _emit(
    writer: BundleWriter,
    reduced: Reduced,
    policy: LoadedPolicy,
    backends: Sequence[str],
    opset: int,
    feeds: Sequence[Feeds],
    expected: Sequence[Sequence[torch.Tensor]],
    tolerance: Tolerance,
    stages: Stages,
) -> tuple[Path | None, dict[str, list[Check]]]:
    """Lower, write and check every engine; a failed parity raises and nothing is left behind."""
    checks: dict[str, list[Check]] = {}
    engine: Path | None = None
    names = list(reduced.program.output_names)
    try:
        lock = yaml.safe_dump(_lock(policy, reduced), sort_keys=False)
        (writer.path / "policy.lock.yaml").write_text(lock, encoding="utf-8")
        if "onnx" in backends:
            with stages.stage("lower to ONNX"):
                engine = writer.path / "model.onnx"
                metadata = {"tokcc.version": tokcc.__version__, "tokcc.policy": lock}
                if reduced.caches is not None:
                    metadata[TOKEN_BYTES] = str(reduced.caches.token_bytes)
                save_onnx(build_onnx(reduced.sliced, opset=opset, metadata=metadata), engine)
        with stages.stage("parity", len(feeds)) as advance:
            if engine is not None:
                checks["onnx"] = check_parity(Session(engine).run, names, feeds, expected, tolerance, advance)
                refuse_difference("onnx", checks["onnx"])
                save_reference(writer.path / "reference.npz", names, feeds, expected)
        if "pt2" in backends:
            with stages.stage("write pt2"):
                checks["pt2"] = save_pt2(reduced.sliced, writer.path / "model.pt2", names, feeds, expected, tolerance)
                refuse_difference("pt2", checks["pt2"])
    except OSError as error:
        raise OutputError(
            "the bundle cannot be written", found=str(error), help="check free space and permissions"
        ) from error
    return engine, checks


def _reference(
    program: Program, reduced: Reduced, example: Feeds, seed: int, stages: Stages
) -> tuple[list[Feeds], list[list[torch.Tensor]]]:
    """Run the eager oracle on what engines are checked with: inputs, and outputs for each."""
    with stages.stage("run the reference"):
        reference = oracle(reduced.program)
        if reduced.caches is None:
            feeds = make_feeds(program, example, seed=seed)
            return feeds, [reference(feed) for feed in feeds]
        check_rebuilt(program, reduced.original, example)
        lengths = lengths_past(reduced.caches.waits)
        return decoder_calls(reduced.program, example, reference, seed=seed, lengths=lengths)


def _lock(policy: LoadedPolicy, reduced: Reduced) -> dict[str, Any]:
    plan = reduced.plan or reduced.caches
    return policy.policy.to_dict() if plan is None else plan.to_dict()


def _baseline(
    writer: BundleWriter, reduced: Reduced, opset: int, stages: Stages, keep: bool, *, needed: bool
) -> Path | None:
    """The same model without reduction, exported the same way."""
    if not (needed or keep):
        return None
    with stages.stage("lower the baseline"):
        path = writer.path / "baseline.onnx"
        try:
            save_onnx(build_onnx(reduced.original, opset=opset), path)
        except OSError as error:
            raise OutputError("the baseline cannot be written", found=str(error)) from error
        return path


def _manifest(
    loaded: Loaded,
    policy: LoadedPolicy,
    reduced: Reduced,
    report: Report,
    backends: Sequence[str],
    opset: int,
    example: Feeds,
) -> Manifest:
    entries: dict[str, BackendEntry] = {}
    if "onnx" in backends:
        entries["onnx"] = BackendEntry(engine="model.onnx", details={"opset": opset})
    if "pt2" in backends:
        entries["pt2"] = BackendEntry(engine="model.pt2", details={"needs": "tokcc"})
    return Manifest(
        tokcc=tokcc.__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=loaded.source,
        policy=policy.policy.name,
        state=report.state,
        inputs=tuple(TensorContract(name=t.name, dtype=t.dtype, shape=t.shape) for t in report.model.inputs),
        outputs=tuple(TensorContract(name=t.name, dtype=t.dtype, shape=t.shape) for t in report.model.outputs),
        ranges={str(symbol): bounds for symbol, bounds in reduced.original.ranges().items()},
        backends=entries,
        versions={name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnx-ir", "numpy")},
    )
