"""One model's engines, with everything that is known of them: lowered, checked, measured, described."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

import tokcc
from tokcc.backends.bundle import BackendEntry, Manifest, TensorContract
from tokcc.backends.calls import check_rebuilt, decoder_calls, lengths_past
from tokcc.backends.feeds import Feeds, example_feeds, make_feeds
from tokcc.backends.genai_config import save_genai_config
from tokcc.backends.generation.added import ADDED_INPUTS, described
from tokcc.backends.generation.decoder import TOKEN_BYTES
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.backends.ort import Session
from tokcc.backends.parity import Check, Tolerance, check_parity, oracle, refuse_difference
from tokcc.backends.pt2 import save_pt2
from tokcc.backends.reference import save_reference
from tokcc.backends.runtime_files import save_runtime_files
from tokcc.capture.loaded import Loaded
from tokcc.config import LoadedPolicy
from tokcc.errors import OutputError
from tokcc.ir.program import Program
from tokcc.passes.inputs import random_values
from tokcc.pipeline.decoding import cache_facts, measure_decoder, read_text
from tokcc.pipeline.measuring import Measurement, facts, measure_engine
from tokcc.pipeline.prompt_speed import measure_prompt
from tokcc.pipeline.reducing import Reduced, reduce_program
from tokcc.pipeline.settling import settle
from tokcc.pipeline.stages import Stages
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

    @property
    def baseline(self) -> Path:
        """The engine without reduction: beside the other, so that both find the same files."""
        return self.engine(".onnx").with_name(
            "baseline.onnx" if self.folder == self.root else f"baseline.{Path(self.stem).name}.onnx"
        )


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
    remarks = save_runtime_files(loaded, place.folder)
    text: TokenText | None = None
    if reduced.caches is not None and options.calibrate and options.calibration is not None:
        with stages.stage("read the calibration data"):
            text = read_text(options.calibration, place.root, plan=reduced.caches)
    feeds, expected = _reference(program, reduced, examples(program, loaded), options.seed, stages)
    engine, checks, settled = _emit(
        place, reduced, policy, options.backends, options.opset, feeds, expected, options.tolerance, stages
    )
    measurement = Measurement(seed=options.seed, threads=options.threads)
    report = facts(loaded, policy, reduced, checks, feeds, stages, threads=options.threads)
    if reduced.caches is not None and reduced.caches.fixed and engine is not None:
        remarks += save_genai_config(loaded, reduced.sliced, engine.name, place.folder)
    report = report.noted(*remarks, *settled)
    if engine is not None:
        baseline = _baseline(place, reduced, options.opset, stages, options.keep_baseline, needed=options.calibrate)
        if options.calibrate and baseline is not None:
            if reduced.caches is None:
                measurement = measure_engine(
                    report, reduced, loaded, engine, baseline, feeds, options.calibration, measurement, stages
                )
            elif reduced.caches.prompt is not None:
                measurement = measure_prompt(report, reduced, loaded, engine, baseline, measurement, stages)
            else:
                measurement = measure_decoder(report, reduced, loaded, engine, baseline, text, measurement, stages)
        if baseline is not None and not options.keep_baseline:
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
    return _manifest(place, loaded, policy, reduced, report, options.backends, options.opset)


def examples(program: Program, loaded: Loaded) -> Feeds:
    """Return the example inputs by name."""
    return example_feeds(program, loaded.example_args, loaded.example_kwargs)


def _emit(
    place: Place,
    reduced: Reduced,
    policy: LoadedPolicy,
    backends: Sequence[str],
    opset: int,
    feeds: Sequence[Feeds],
    expected: Sequence[Sequence[torch.Tensor]],
    tolerance: Tolerance,
    stages: Stages,
) -> tuple[Path | None, dict[str, list[Check]], list[str]]:
    """Lower, write and check every engine; a failed parity raises and nothing is left behind."""
    checks: dict[str, list[Check]] = {}
    remarks: list[str] = []
    engine: Path | None = None
    names = list(reduced.program.output_names)
    try:
        lock = yaml.safe_dump(bundle_weights(_lock(policy, reduced), policy.folder, place.folder), sort_keys=False)
        (place.folder / "policy.lock.yaml").write_text(lock, encoding="utf-8")
        if "onnx" in backends:
            with stages.stage("lower to ONNX"):
                engine = place.engine(".onnx")
                metadata = {"tokcc.version": tokcc.__version__, "tokcc.policy": lock}
                if reduced.caches is not None:
                    metadata[TOKEN_BYTES] = str(reduced.caches.token_bytes)
                    if reduced.declared_inputs:
                        metadata[ADDED_INPUTS] = described(reduced.declared_inputs)
                save_onnx(build_onnx(reduced.sliced, opset=opset, metadata=metadata), engine)
        with stages.stage("parity", len(feeds)) as advance:
            if engine is not None:
                checks["onnx"] = check_parity(Session(engine).run, names, feeds, expected, tolerance, advance)
                why: str | None = None
                if not all(check.passed for check in checks["onnx"]):
                    settled = settle(reduced.program, reduced.sliced, engine, names, feeds, opset, tolerance)
                    if isinstance(settled, str):
                        why = settled
                    else:
                        expected, checks["onnx"] = settled.expected, settled.checks
                        remarks.append(settled.note)
                refuse_difference("onnx", checks["onnx"], why)
                save_reference(place.folder / "reference.npz", names, feeds, expected)
        if "pt2" in backends:
            with stages.stage("write pt2"):
                checks["pt2"] = save_pt2(reduced.sliced, place.engine(".pt2"), names, feeds, expected, tolerance)
                refuse_difference("pt2", checks["pt2"])
    except OSError as error:
        raise OutputError(
            "the bundle cannot be written", found=str(error), help="check free space and permissions"
        ) from error
    return engine, checks, remarks


def _reference(
    program: Program, reduced: Reduced, example: Feeds, seed: int, stages: Stages
) -> tuple[list[Feeds], list[list[torch.Tensor]]]:
    """Run the eager oracle on what engines are checked with: inputs, and outputs for each."""
    with stages.stage("run the reference"):
        reference = oracle(reduced.program)
        if reduced.caches is None:
            generator = torch.Generator().manual_seed(seed)
            feeds = [
                {**feed, **random_values(reduced.program, reduced.declared_inputs, feed, generator)}
                for feed in make_feeds(program, example, seed=seed)
            ]
            return feeds, [reference(feed) for feed in feeds]
        check_rebuilt(program, reduced.original, example)
        lengths = lengths_past(reduced.caches.waits)
        added = reduced.declared_inputs
        prompt = reduced.caches.prompt
        return decoder_calls(
            reduced.program, example, reference, seed=seed, lengths=lengths, added=added, prompt=prompt
        )


def _lock(policy: LoadedPolicy, reduced: Reduced) -> dict[str, Any]:
    plan = reduced.plan or reduced.caches
    return policy.policy.to_dict() if plan is None else plan.to_dict()


def _baseline(place: Place, reduced: Reduced, opset: int, stages: Stages, keep: bool, *, needed: bool) -> Path | None:
    """The same model without reduction, exported the same way."""
    if not (needed or keep):
        return None
    with stages.stage("lower the baseline"):
        path = place.baseline
        try:
            save_onnx(build_onnx(reduced.original, opset=opset), path)
        except OSError as error:
            raise OutputError("the baseline cannot be written", found=str(error)) from error
        return path


def _manifest(
    place: Place,
    loaded: Loaded,
    policy: LoadedPolicy,
    reduced: Reduced,
    report: Report,
    backends: Sequence[str],
    opset: int,
) -> Manifest:
    entries: dict[str, BackendEntry] = {}
    if "onnx" in backends:
        entries["onnx"] = BackendEntry(engine=f"{place.stem}.onnx", details={"opset": opset})
    if "pt2" in backends:
        entries["pt2"] = BackendEntry(engine=f"{place.stem}.pt2", details={"needs": "tokcc"})
    return Manifest(
        tokcc=tokcc.__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=loaded.source,
        policy=policy.policy.name,
        state=report.state,
        inputs=tuple(TensorContract(**t.model_dump()) for t in report.model.inputs),
        outputs=tuple(TensorContract(name=t.name, dtype=t.dtype, shape=t.shape) for t in report.model.outputs),
        ranges={str(symbol): bounds for symbol, bounds in reduced.original.ranges().items()},
        backends=entries,
        versions={name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnx-ir", "numpy")},
    )
