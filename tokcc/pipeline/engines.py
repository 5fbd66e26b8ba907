"""One model's engines, with everything that is known of them: lowered, checked, measured, described."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

import tokcc
from tokcc.backends.aoti import AotiOptions, package
from tokcc.backends.bundle import BackendEntry, Manifest, TensorContract
from tokcc.backends.calls import check_rebuilt, decoder_calls, lengths_past
from tokcc.backends.feeds import Feeds, example_feeds, make_feeds
from tokcc.backends.genai_config import save_genai_config
from tokcc.backends.generation.added import ADDED_INPUTS, described
from tokcc.backends.generation.decoder import SLOTS, TOKEN_BYTES
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.backends.parity import Check, Tolerance, oracle, refuse_difference
from tokcc.backends.pt2 import save_pt2
from tokcc.backends.reference import save_reference
from tokcc.backends.runtime_files import save_runtime_files
from tokcc.backends.sessions import AOTI
from tokcc.backends.tensorrt.graph import Lowered
from tokcc.backends.tensorrt.options import TensorrtOptions
from tokcc.capture.loaded import Loaded
from tokcc.config import LoadedPolicy
from tokcc.errors import OutputError
from tokcc.ir.program import Program
from tokcc.lowering.aten import refuse_deep_sizes, refuse_loops
from tokcc.passes.inputs import random_values
from tokcc.pipeline.decoding import cache_facts, measure_decoder, read_text
from tokcc.pipeline.measuring import Measurement, facts, measure_engine, measure_further
from tokcc.pipeline.packaging import CUDA_FOLDER, Packaged, write_package
from tokcc.pipeline.prompt_speed import measure_prompt
from tokcc.pipeline.reducing import Reduced, reduce_program
from tokcc.pipeline.settling import check_engine
from tokcc.pipeline.stages import Stages
from tokcc.pipeline.tensorrt import FOLDER as TENSORRT
from tokcc.pipeline.tensorrt import lower_tensorrt, write_tensorrt
from tokcc.pipeline.weights import bundle_weights
from tokcc.report.gates import Gate, evaluate_gates
from tokcc.report.schema import Report
from tokcc.report.tokens import TokenText
from tokcc.report.write import write_report

__all__ = ["Options", "Place", "examples", "write_engines"]


@dataclass(frozen=True)
class Options:
    """How engines are made and measured; as for :func:`tokcc.compile`."""

    backends: tuple[str, ...] = ("onnx",)
    opset: int = 18
    tolerance: Tolerance = field(default_factory=Tolerance)
    seed: int = 0
    threads: int = 0
    calibrate: bool = True
    calibration: Any = None
    gates: tuple[Gate, ...] = ()
    keep_baseline: bool = False
    slicing: bool = True
    aoti: AotiOptions = field(default_factory=AotiOptions)
    tensorrt: TensorrtOptions = field(default_factory=TensorrtOptions)


@dataclass(frozen=True)
class Place:
    """Where the files of one model go.

    Attributes:
        root: The bundle, while it is written.
        folder: Report, reference and applied policy.
        stem: The engines' path in the bundle, without its ending.
        shown: What messages call the bundle.
    """

    root: Path
    folder: Path
    stem: str
    shown: str

    def engine(self, ending: str) -> Path:
        """Return the path of an engine."""
        return self.root / f"{self.stem}{ending}"

    def baseline(self, ending: str) -> Path:
        """The engine without reduction: beside the other, so that both find the same files."""
        return self.engine(ending).with_name(
            f"baseline{ending}" if self.folder == self.root else f"baseline.{Path(self.stem).name}{ending}"
        )


@dataclass(frozen=True)
class _Emitted:
    """The engines of a model.

    Attributes:
        onnx: The ONNX model, if asked for.
        aoti: The same of AOTInductor.
        tensorrt: The graph that TensorRT builds from.
        checks: Each held against the oracle, by backend.
        remarks: For the report.
    """

    onnx: Path | None
    aoti: Packaged | None
    tensorrt: Packaged | None
    checks: dict[str, list[Check]]
    remarks: list[str]

    def paths(self) -> dict[str, Path]:
        """Return the engines that can be timed, by backend."""
        package = None if self.aoti is None else self.aoti.engine
        return {name: path for name, path in (("onnx", self.onnx), ("aoti", package)) if path is not None}


def write_engines(
    place: Place, loaded: Loaded, program: Program, policy: LoadedPolicy, options: Options, stages: Stages
) -> Manifest:
    """Write engines and report of one model.

    Args:
        place: Where.
        loaded: The model.
        program: Its clean program.
        policy: The policy.
        options: How.
        stages: Progress.

    Returns:
        What the manifest says of them.

    Raises:
        TokccError: One of its kinds, by stage.
    """
    reduced = reduce_program(program, policy, stages, slicing=options.slicing)
    lowered = refuse_unable(reduced, policy, options, examples(program, loaded))
    remarks = save_runtime_files(loaded, place.folder)
    text: TokenText | None = None
    if reduced.caches is not None and options.calibrate and options.calibration is not None:
        with stages.stage("read the calibration data"):
            text = read_text(options.calibration, place.root, plan=reduced.caches)
    feeds, expected = _reference(program, reduced, examples(program, loaded), options.seed, stages)
    made = _emit(place, reduced, policy, options, lowered, feeds, expected, stages)
    engine = made.onnx
    measurement = Measurement(seed=options.seed, threads=options.threads)
    report = facts(loaded, policy, reduced, made.checks, feeds, stages, threads=options.threads)
    if reduced.caches is not None and reduced.caches.fixed and engine is not None:
        remarks += save_genai_config(loaded, reduced.sliced, engine.name, place.folder, slots=reduced.caches.longest)
    report = report.noted(*remarks, *made.remarks)
    baselines = _baselines(place, reduced, made, feeds[0], options, stages)
    if options.calibrate and baselines:
        if reduced.caches is None:
            measurement = _measure(report, reduced, loaded, made.paths(), baselines, feeds, options, stages)
        elif engine is not None and reduced.caches.prompt is not None:
            measurement = measure_prompt(report, reduced, loaded, engine, baselines["onnx"], measurement, stages)
        elif engine is not None:
            measurement = measure_decoder(report, reduced, loaded, engine, baselines["onnx"], text, measurement, stages)
    for baseline in () if options.keep_baseline else baselines.values():
        baseline.unlink(missing_ok=True)
        baseline.with_name(baseline.name + ".data").unlink(missing_ok=True)
    if measurement.report is not None:
        report = measurement.report
    elif reduced.caches is not None:
        report = cache_facts(report, reduced, loaded)
    report = report.model_copy(update={"stages": dict(stages.seconds)})
    report = report.model_copy(update={"gates": tuple(evaluate_gates(report, options.gates))})
    with stages.stage("write the report"):
        report = write_report(
            report,
            place.folder,
            images=measurement.images,
            texts=measurement.texts,
            stages=measurement.kept,
            bundle=place.shown,
        )
    return _manifest(place, loaded, policy, reduced, report, made, options)


def examples(program: Program, loaded: Loaded) -> Feeds:
    """Return the example inputs by name."""
    return example_feeds(program, loaded.example_args, loaded.example_kwargs)


def refuse_unable(reduced: Reduced, policy: LoadedPolicy, options: Options, example: Feeds) -> Lowered | None:
    """Refuse a policy with a method that a backend cannot run, before anything is written.

    Returns:
        The graph for TensorRT, if it is asked for.

    Raises:
        LoweringError: Naming the operation, its step, and the backends that can.
        PlanError: A backend wants to know more of the shapes.
    """
    if "aoti" in options.backends:
        for refuse in (refuse_loops, refuse_deep_sizes):
            refuse(reduced.sliced, "aoti", "--backend onnx or --backend pt2")
    if "tensorrt" not in options.backends:
        return None
    return lower_tensorrt(reduced, policy, example, options.tensorrt, options.opset).legal(policy)


def _emit(
    place: Place,
    reduced: Reduced,
    policy: LoadedPolicy,
    options: Options,
    lowered: Lowered | None,
    feeds: Sequence[Feeds],
    expected: Sequence[Sequence[torch.Tensor]],
    stages: Stages,
) -> _Emitted:
    """Lower, write and check every engine; a failed parity raises and nothing is left behind."""
    checks: dict[str, list[Check]] = {}
    remarks: list[str] = []
    engine: Path | None = None
    packaged: Packaged | None = None
    graph: Packaged | None = None
    names = list(reduced.program.output_names)
    opset, tolerance = options.opset, options.tolerance
    kept = expected
    """What the bundle is verified with: given the choices of the first engine."""
    try:
        lock = yaml.safe_dump(bundle_weights(_lock(policy, reduced), policy.folder, place.folder), sort_keys=False)
        (place.folder / "policy.lock.yaml").write_text(lock, encoding="utf-8")
        metadata = {"tokcc.version": tokcc.__version__, "tokcc.policy": lock}
        if "onnx" in options.backends:
            with stages.stage("lower to ONNX"):
                engine = place.engine(".onnx")
                own = dict(metadata)
                if reduced.caches is not None:
                    own[TOKEN_BYTES] = str(reduced.caches.token_bytes)
                    if reduced.caches.longest is not None:
                        own[SLOTS] = str(reduced.caches.longest)
                    if reduced.declared_inputs:
                        own[ADDED_INPUTS] = described(reduced.declared_inputs)
                save_onnx(build_onnx(reduced.sliced, opset=opset, metadata=own), engine)
            with stages.stage("parity", len(feeds)) as advance:
                build = partial(_write_onnx, opset=opset)
                found = check_engine(
                    "onnx", reduced.program, reduced.sliced, engine, feeds, expected, build, tolerance, advance
                )
            kept, checks["onnx"] = found.expected, found.checks
            remarks += [] if found.note is None else [found.note]
        if "aoti" in options.backends:
            packaged = write_package(
                place.engine(AOTI), reduced, options.aoti, metadata, feeds, expected, tolerance, stages
            )
            checks["aoti"] = packaged.checks
            remarks += packaged.remarks
            if engine is None:
                kept = packaged.expected
        if lowered is not None:
            folder, name = place.root / TENSORRT, Path(place.stem).name  # parts go into one repository
            graph = write_tensorrt(
                folder if place.folder == place.root else folder / name, name,
                reduced, policy, lowered, options.tensorrt, metadata, feeds, expected, tolerance, options.seed, stages,
            )  # fmt: skip
            checks["tensorrt"] = graph.checks
            remarks += graph.remarks
            if engine is None and packaged is None and graph.feeds is None:
                kept = graph.expected
        if checks:
            save_reference(place.folder / "reference.npz", names, feeds, kept)
        for backend, made in (("aoti", packaged), ("tensorrt", graph)):
            if made is not None and made.expected is not kept:
                own_feeds = feeds if made.feeds is None else made.feeds
                save_reference(place.folder / f"reference.{backend}.npz", names, own_feeds, made.expected)
        if "pt2" in options.backends:
            with stages.stage("write pt2"):
                checks["pt2"] = save_pt2(reduced.sliced, place.engine(".pt2"), names, feeds, expected, tolerance)
                refuse_difference("pt2", checks["pt2"])
    except OSError as error:
        raise OutputError(
            "the bundle cannot be written", found=str(error), help="check free space and permissions"
        ) from error
    return _Emitted(engine, packaged, graph, checks, remarks)


def _write_onnx(program: Program, path: Path, *, opset: int) -> None:
    save_onnx(build_onnx(program, opset=opset), path)


def _reference(
    program: Program, reduced: Reduced, example: Feeds, seed: int, stages: Stages
) -> tuple[list[Feeds], list[list[torch.Tensor]]]:
    """Run the eager oracle on what engines are checked with: inputs, and outputs for each."""
    with stages.stage("run the reference"):
        reference = oracle(reduced.program)
        if reduced.scans is not None:
            return decoder_calls(reduced.program, example, reference, seed=seed, before=reduced.scans.before)
        if reduced.caches is None:
            generator = torch.Generator().manual_seed(seed)
            feeds = [
                {**feed, **random_values(reduced.program, reduced.declared_inputs, feed, generator)}
                for feed in make_feeds(program, example, seed=seed)
            ]
            return feeds, [reference(feed) for feed in feeds]
        check_rebuilt(program, reduced.original, example)
        lengths = lengths_past(reduced.caches.waits, reduced.caches.longest)
        added = reduced.declared_inputs
        prompt = reduced.caches.prompt
        return decoder_calls(
            reduced.program, example, reference, seed=seed, lengths=lengths, added=added, prompt=prompt
        )


def _lock(policy: LoadedPolicy, reduced: Reduced) -> dict[str, Any]:
    plan = reduced.plan or reduced.caches or reduced.scans
    return policy.policy.to_dict() if plan is None else plan.to_dict()


def _baselines(
    place: Place, reduced: Reduced, made: _Emitted, example: Feeds, options: Options, stages: Stages
) -> dict[str, Path]:
    """The same model without reduction, exported the same way, for each backend that has an engine."""
    if not (options.calibrate or options.keep_baseline):
        return {}
    found: dict[str, Path] = {}
    try:
        if made.onnx is not None:
            with stages.stage("lower the baseline"):
                found["onnx"] = place.baseline(".onnx")
                _write_onnx(reduced.original, found["onnx"], opset=options.opset)
        # Decoders are measured on the ONNX engine only.
        if made.aoti is not None and made.aoti.engine is not None and (reduced.caches is None or options.keep_baseline):
            with stages.stage("compile the baseline with AOTInductor"):
                found["aoti"] = place.baseline(AOTI)
                package(reduced.original, found["aoti"], example, options.aoti)
    except OSError as error:
        raise OutputError("the baseline cannot be written", found=str(error)) from error
    return found


def _measure(
    report: Report,
    reduced: Reduced,
    loaded: Loaded,
    engines: Mapping[str, Path],
    baselines: Mapping[str, Path],
    feeds: Sequence[Feeds],
    options: Options,
    stages: Stages,
) -> Measurement:
    """Measure the first engine in full, and how fast the others are."""
    how = Measurement(seed=options.seed, threads=options.threads)
    (name, engine), *others = engines.items()
    found = measure_engine(report, reduced, loaded, engine, baselines[name], feeds, options.calibration, how, stages)
    for name, engine in others:
        found = measure_further(found, name, engine, baselines[name], feeds, stages)
    return found


def _manifest(
    place: Place,
    loaded: Loaded,
    policy: LoadedPolicy,
    reduced: Reduced,
    report: Report,
    made: _Emitted,
    options: Options,
) -> Manifest:
    entries: dict[str, BackendEntry] = {}
    if made.onnx is not None:
        entries["onnx"] = BackendEntry(engine=f"{place.stem}.onnx", details={"opset": options.opset})
    if made.aoti is not None:
        path = made.aoti.engine or place.engine(AOTI).parent / CUDA_FOLDER / "model.pt2"
        entries["aoti"] = BackendEntry(engine=path.relative_to(place.root).as_posix(), details=made.aoti.details)
    if made.tensorrt is not None and made.tensorrt.engine is not None:
        path = made.tensorrt.engine.relative_to(place.root)
        entries["tensorrt"] = BackendEntry(engine=path.as_posix(), details=made.tensorrt.details)
    if "pt2" in options.backends:
        entries["pt2"] = BackendEntry(engine=f"{place.stem}.pt2", details={"needs": "tokcc"})
    return Manifest(
        tokcc=tokcc.__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=loaded.source,
        policy=policy.policy.name,
        state=report.state,
        inputs=tuple(TensorContract(**t.model_dump()) for t in report.model.inputs),
        outputs=tuple(TensorContract(name=t.name, dtype=t.dtype, shape=t.shape) for t in report.model.outputs),
        ranges={
            reduced.sliced.size_names.get(symbol, str(symbol)): bounds
            for symbol, bounds in reduced.sliced.ranges().items()
        },
        backends=entries,
        versions={name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnx-ir", "numpy")},
    )
