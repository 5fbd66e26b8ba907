"""What can be done with an existing bundle: verify, bench, calibrate, rebuild the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokcc.backends.bundle import Bundle, BundleWriter
from tokcc.backends.float32 import open_in_float32
from tokcc.backends.parity import Tolerance, check_parity
from tokcc.backends.reference import load_reference
from tokcc.backends.sessions import open_engine
from tokcc.errors import UsageError
from tokcc.pipeline.decoder_speed import Limits
from tokcc.pipeline.decoding import read_text, with_generated
from tokcc.pipeline.generating import Pair
from tokcc.pipeline.measuring import fidelity_of, latency_of, parity_checks, runtime_of
from tokcc.pipeline.reading import positions_beside
from tokcc.pipeline.stages import Stages
from tokcc.progress import Progress, silent
from tokcc.report.batches import InputSpec
from tokcc.report.data import load_calibration
from tokcc.report.gates import Gate, evaluate_gates, parse_gates
from tokcc.report.machine import describe_machine
from tokcc.report.measure import measure
from tokcc.report.schema import Decoding, Latency, Parity, ParityCheck, PeakMemory, Totals
from tokcc.report.write import write_report

__all__ = ["Measured", "bench", "calibrate", "rebuild_report", "verify"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Measured:
    """What ``bench`` measured."""

    latency: Latency
    memory: PeakMemory | None = None
    decoding: Decoding | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        memory = None if self.memory is None else self.memory.model_dump(mode="json")
        found: dict[str, Any] = {"latency": self.latency.model_dump(mode="json"), "memory": memory}
        if self.decoding is not None:
            found |= {"decoding": self.decoding.model_dump(mode="json"), "notes": list(self.notes)}
        return found


def verify(
    bundle: Bundle,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Parity:
    """Run the engines on the inputs kept in the bundle and compare with the oracle's outputs.

    Args:
        bundle: The bundle.
        atol: Absolute tolerance; default by dtype and scale.
        rtol: Relative tolerance.
        seed: Unused by stored inputs; kept for engines that are verified on random ones.
        progress: Receives the stages.
    """
    if bundle.manifest.parts:
        return _verify_parts(bundle, atol=atol, rtol=rtol, seed=seed, progress=progress)
    del seed
    stages = Stages(progress or silent())
    checks: list[ParityCheck] = []
    batches = 0
    for name in bundle.verifiable or (bundle.chosen(),):
        # Where rounding decides, each engine may have chosen otherwise; outputs are those given its choices.
        own = bundle.path / f"reference.{name}.npz"
        feeds, outputs = zip(*load_reference(own if own.is_file() else bundle.path / "reference.npz"), strict=True)
        session = open_in_float32(bundle.engine(name)) if name == "tensorrt" else open_engine(bundle.engine(name))
        with stages.stage(f"parity of the {name} engine", len(feeds)) as advance:
            expected = [list(each.values()) for each in outputs]
            within, made_in = Tolerance(atol, rtol), _computed_in(bundle, name)
            found = check_parity(session.run, list(outputs[0]), feeds, expected, within, advance, made_in)
        checks += parity_checks(name, found)
        batches = len(feeds)
    return Parity(
        passed=all(c.passed for c in checks),
        batches=batches,
        reference="outputs of the eager reduced program, kept in the bundle",
        inputs="kept in the bundle",
        checks=tuple(checks),
    )


def _computed_in(bundle: Bundle, backend: str) -> torch.dtype:
    """Return the type that an engine computes in where it is verified."""
    found: torch.dtype = getattr(torch, bundle.report.model.dtype or "float32")
    in_float32 = backend == "tensorrt" and found == torch.bfloat16  # see open_in_float32
    return torch.float32 if in_float32 else found


def _verify_parts(bundle: Bundle, **options: Any) -> Parity:
    """Verify every part; engines are called after their parts."""
    found = {name: verify(bundle.part(name), **options) for name in bundle.manifest.parts}
    first = next(iter(found.values()))
    return first.model_copy(
        update={
            "passed": all(parity.passed for parity in found.values()),
            "batches": sum(parity.batches for parity in found.values()),
            "checks": tuple(
                check.model_copy(update={"engine": f"{name} ({check.engine})"})
                for name, parity in found.items()
                for check in parity.checks
            ),
        }
    )


def _timing_feeds(bundle: Bundle, batch: int | None) -> dict[str, Array]:
    feeds = {name: value.numpy() for name, value in load_reference(bundle.path / "reference.npz")[0][0].items()}
    if batch is None:
        return feeds
    contracts = {c.name: c for c in bundle.manifest.inputs}
    result: dict[str, Array] = {}
    for name, value in feeds.items():
        first = contracts[name].shape[0]
        if isinstance(first, int) and first != batch:
            raise UsageError("the batch size of this engine is fixed", needed=str(first), found=str(batch))
        result[name] = np.resize(value, (batch, *value.shape[1:]))
    return result


def _is_decoder(bundle: Bundle) -> bool:
    return any(contract.name.startswith("past_key_values.") for contract in bundle.manifest.inputs)


def _about_prompts(bundle: Bundle) -> bool:
    """Whether the bundle was measured on prompts in one call."""
    decoding = bundle.report.decoding
    return decoding is not None and bool(decoding.prompts)


def _pair(bundle: Bundle, baseline: Path, *, threads: int, seed: int, batch: int | None = None) -> Pair:
    engine = bundle.engine("onnx")
    positions = positions_beside(bundle.root / engine.name)
    return Pair(baseline, engine, positions=positions, batch=batch, threads=threads, seed=seed)


def bench(
    bundle: Bundle,
    *,
    against: Path | None = None,
    backend: str | None = None,
    runs: int = 30,
    threads: int = 0,
    batch: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measured:
    """Time an engine against its baseline (or another engine's file), taking turns; decoders at several contexts.

    Raises:
        UsageError: There is nothing to compare with.
    """
    stages = Stages(progress or silent())
    if bundle.manifest.parts:
        raise UsageError(
            "the parts of a bundle are measured one by one", needed=f"--part, one of {', '.join(bundle.manifest.parts)}"
        )
    decoder = _is_decoder(bundle)
    name = bundle.chosen("onnx" if decoder else backend)
    other = against or bundle.baseline_of(name)
    if not other.is_file():
        raise UsageError(
            "there is no engine to compare with",
            needed=f"{bundle.baseline_of(name).name} in the bundle, or --against ENGINE",
            help="compile with --keep-baseline",
        )
    if decoder:
        pair = _pair(bundle, other, threads=threads, seed=seed, batch=batch)
        found = pair.measure(stages, text=None, limits=Limits(runs=runs), whole=False, prompts=_about_prompts(bundle))
        return Measured(latency_of(found.timed, found.timed_feeds, threads), None, found.decoding, found.notes)
    feeds = _timing_feeds(bundle, batch)
    one, two = open_engine(other, threads=threads), open_engine(bundle.engine(name), threads=threads)
    missing = [name for name in one.inputs if name not in feeds]
    if missing:
        raise UsageError(f"`{other}` takes other inputs", needed=", ".join(feeds), found=", ".join(one.inputs))
    with stages.stage("measure latency", runs) as advance:
        timed = measure(
            {"baseline": lambda: one.run(feeds), "engine": lambda: two.run(feeds)},
            budget_s=0.0,
            min_rounds=runs,
            max_rounds=runs,
            seed=seed,
            on_round=lambda _: advance(1),
        )
    return Measured(latency_of(timed, feeds, threads, runtime_of(bundle.engine(name))))


def calibrate(
    bundle: Bundle,
    data: Any,
    *,
    gates: Any = None,
    seed: int = 0,
    threads: int = 0,
    preprocessor: Path | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Measure an existing bundle on new data; the engines stay, report and gates are renewed.

    Raises:
        UsageError: The bundle has no baseline, or the data does not fit.
    """
    stages = Stages(progress or silent())
    wanted = parse_gates(gates or ())
    _refuse_parts(bundle, "calibrate")
    name = bundle.chosen()
    baseline = bundle.baseline_of(name)
    if not baseline.is_file():
        raise UsageError(
            "the bundle holds no baseline to compare with",
            needed=baseline.name,
            help="compile with --keep-baseline, or give the data to `tokcc compile --calib`",
        )
    report = bundle.report
    if _is_decoder(bundle):
        return _calibrate_decoder(bundle, data, wanted, _pair(bundle, baseline, threads=threads, seed=seed), threads,
                                  preprocessor, stages)  # fmt: skip
    specs = [InputSpec(c.name, c.dtype, c.shape, c.unguided) for c in bundle.manifest.inputs]
    with stages.stage("read the calibration data"):
        loaded = load_calibration(data, specs, preprocessor=preprocessor, seed=seed)
    one, two = open_engine(baseline, threads=threads), open_engine(bundle.engine(name), threads=threads)
    fidelity = fidelity_of(report, loaded, one, two, stages)
    feeds = dict(next(iter(loaded.batches()))[0])
    with stages.stage("measure latency"):
        timed = measure({"baseline": lambda: one.run(feeds), "engine": lambda: two.run(feeds)}, seed=seed)
    latency = latency_of(timed, feeds, threads, runtime_of(bundle.engine(name)))
    shapes = latency.shapes
    same_shapes = report.totals.shapes == shapes
    totals = Totals.of(
        report.totals.flops_before if same_shapes else 0,
        report.totals.flops_after if same_shapes else 0,
        latency=latency,
        shapes=shapes,
    )
    report = report.model_copy(
        update={
            "fidelity": fidelity,
            "latency": latency,
            "further": {},
            "totals": totals,
            "machine": describe_machine(threads),
            "notes": loaded.notes,
            "warnings": (),
        }
    )
    report = report.model_copy(update={"gates": tuple(evaluate_gates(report, wanted))})
    with BundleWriter(bundle.path, force=True, base=bundle) as writer:
        report = write_report(report, writer.path, images=loaded.images, texts=loaded.texts, bundle=str(bundle.path))
        return writer.commit(bundle.manifest.model_copy(update={"state": report.state}))


def _refuse_parts(bundle: Bundle, what: str) -> None:
    """Refuse what would rewrite a bundle of several parts: it is written as a whole."""
    if bundle.manifest.parts or bundle.root != bundle.path:
        raise UsageError(
            f"tokcc cannot {what} a bundle of several parts",
            help="compile it again; `calibration={part: data}` of tokcc.compile measures parts on data",
        )


def _calibrate_decoder(
    bundle: Bundle,
    data: Any,
    gates: Sequence[Gate],
    pair: Pair,
    threads: int,
    preprocessor: Path | None,
    stages: Stages,
) -> Bundle:
    with stages.stage("read the calibration data"):
        text = read_text(data, bundle.path if preprocessor is None else preprocessor)
    found = pair.measure(stages, text=text, limits=Limits(), prompts=_about_prompts(bundle))
    report = bundle.report.model_copy(update={"machine": describe_machine(threads), "notes": (), "warnings": ()})
    report = with_generated(report, found, threads)
    report = report.model_copy(update={"gates": tuple(evaluate_gates(report, gates))})
    with BundleWriter(bundle.path, force=True, base=bundle) as writer:
        report = write_report(report, writer.path, bundle=str(bundle.path))
        return writer.commit(bundle.manifest.model_copy(update={"state": report.state}))


def rebuild_report(bundle: Bundle, *, progress: Progress | None = None) -> Bundle:
    """Write ``report.html`` and its charts again from ``report.json``."""
    _refuse_parts(bundle, "rebuild the reports of")
    stages = Stages(progress or silent())
    with stages.stage("write the report"), BundleWriter(bundle.path, force=True, base=bundle) as writer:
        write_report(bundle.report, writer.path, bundle=str(bundle.path))
        return writer.commit(bundle.manifest)
