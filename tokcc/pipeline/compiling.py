"""``tokcc compile``: the main job, as a table of contents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from tokcc.backends.aoti import AotiOptions
from tokcc.backends.bundle import BundleWriter
from tokcc.backends.parity import Tolerance
from tokcc.backends.tensorrt.options import TensorrtOptions
from tokcc.backends.tensorrt.profiles import Shapes, varying_axes
from tokcc.capture.export import capture
from tokcc.capture.loaded import Loaded
from tokcc.config import LoadedPolicy, Policy, load_policy
from tokcc.errors import LoweringError, UsageError
from tokcc.ir.program import Program
from tokcc.passes.inputs import random_values
from tokcc.passes.methods import library
from tokcc.pipeline.decoding import cache_facts
from tokcc.pipeline.engines import Options, Place, examples, refuse_unable, write_engines
from tokcc.pipeline.measuring import facts
from tokcc.pipeline.parts import policy_of, write_parts
from tokcc.pipeline.reducing import reduce_program
from tokcc.pipeline.request import ModelRequest
from tokcc.pipeline.stages import Stages
from tokcc.progress import Progress, silent
from tokcc.report.gates import parse_gates

__all__ = ["DryRun", "compile", "reduce"]

_BACKENDS = ("onnx", "pt2", "aoti", "tensorrt")


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
    device: str = "cpu",
    aoti: Mapping[str, Any] | None = None,
    tensorrt: Mapping[str, Any] | None = None,
    shapes: Shapes | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Compile a model with a policy into a bundle.

    Args:
        model: An ``nn.Module``, an ``ExportedProgram``, or anything the command line takes.
        policy: A policy file, a preset's name, ``none``, a dict, or a policy.
        example_inputs: Tuple or dict of tensors; archives and Hugging Face folders bring their own.
        dynamic_shapes: As for ``torch.export.export``.
        backends: Engines to write: ``onnx``, ``pt2``, ``aoti``, ``tensorrt``.
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
        device: What the aoti backend compiles for: ``cpu``, or ``cuda``, for which the bundle gets a script instead.
        aoti: Options of the aoti backend: ``{"freezing": False}`` leaves the weights replaceable (and halves the
            speed); others are those of ``torch._inductor.config``.
        tensorrt: Options of the tensorrt backend: ``{"plugins": True}`` writes a graph with our kernels too, compiled
            for ``"compute_capability": [8.0]``.
        shapes: Smallest, usual and largest shape of inputs, by name. Axes that vary are dynamic, unless the model
            brings dynamic axes of its own; TensorRT engines are made for these shapes.
        dry_run: Stop after planning; returns a :class:`DryRun`.
        progress: Receives the stages.

    Returns:
        The bundle. A missed gate does not raise: ``bundle.manifest.state`` says so.

    Raises:
        TokccError: One of its kinds, by stage.
    """
    _check_backends(backends)
    packaging = AotiOptions.of(device, aoti or {})
    if "aoti" not in backends and packaging != AotiOptions():
        raise UsageError("a device and aoti options are for the aoti backend", needed="aoti among the backends")
    if "tensorrt" not in backends and tensorrt:
        raise UsageError("tensorrt options are for the tensorrt backend", needed="tensorrt among the backends")
    profiled, varying = "tensorrt" in backends, varying_axes(shapes or {})
    stages = Stages(progress or silent())
    wanted = parse_gates(gates or ())
    chosen = load_policy(policy, presets=library())
    request = ModelRequest(
        model,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        inputs=inputs,
        # For an engine of fixed profiles a model's own axes are welcome; else they and shapes contradict each other.
        dynamic=dynamic if profiled else (*dynamic, *varying),
        or_dynamic=varying if profiled else (),
        task=task,
        dtype=dtype,
        allow_pickle=allow_pickle,
    )
    options = Options(
        backends=tuple(backends),
        opset=opset,
        tolerance=Tolerance(atol, rtol),
        seed=seed,
        threads=threads,
        calibrate=calibrate,
        calibration=calibration,
        gates=tuple(wanted),
        keep_baseline=keep_baseline,
        slicing=slicing,
        aoti=packaging,
        tensorrt=TensorrtOptions.of(tensorrt or {}, shapes or {}),
    )
    if dry_run:
        return _dry_run(request, chosen, options, stages)
    if output is None:
        raise UsageError("no output folder is given", help='for instance `output="out/"`')
    with BundleWriter(output, force=force) as writer:
        if request.multimodal:
            return writer.commit(write_parts(writer.path, request.open_parts(stages), chosen, options, stages))
        loaded, program = request.open(stages)
        place = Place(writer.path, writer.path, "model", str(output))
        return writer.commit(write_engines(place, loaded, program, chosen, options, stages))


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


def _dry_run(request: ModelRequest, policy: LoadedPolicy, options: Options, stages: Stages) -> DryRun:
    if request.multimodal:
        plans = {
            name: _planned(part, capture(part), policy_of(policy, name), options, stages)
            for name, part in request.open_parts(stages).parts()
        }
        return DryRun({"policy": policy.policy.name, "parts": plans})
    return DryRun(_planned(*request.open(stages), policy, options, stages))


def _planned(
    loaded: Loaded, program: Program, policy: LoadedPolicy, options: Options, stages: Stages
) -> dict[str, Any]:
    reduced = reduce_program(program, policy, stages)
    example = examples(program, loaded)
    refuse_unable(reduced, policy, options, example)
    example |= random_values(reduced.program, reduced.declared_inputs, example, torch.Generator().manual_seed(0))
    report = facts(loaded, policy, reduced, {}, [example], stages, threads=0)
    if reduced.caches is not None:
        report = cache_facts(report, reduced, loaded)
    layers = [
        row.model_dump(include={"layer", "site", "step", "tokens_in", "tokens_out"})
        for row in report.layers
        # Behind a cut of a prompt, layers without a step of their own hold less, too.
        if row.step or row.tokens_out != row.tokens_in
    ]
    return {
        "policy": report.policy.name,
        "layers": layers,
        "ideal_speedup": report.totals.ideal_speedup,
        "warnings": list(report.warnings),
        "notes": list(report.notes),
    }
