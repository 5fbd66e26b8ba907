"""``tokcc compile``: the main job."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tokcc.cli.output import Json, Output, Quiet, Verbose
from tokcc.cli.shapes import shape_range
from tokcc.errors import GateError, SpeedGateError, UsageError

if TYPE_CHECKING:
    from tokcc.backends.bundle import Bundle

__all__ = [
    "Backend",
    "Dynamic",
    "Inputs",
    "LargestShapes",
    "Model",
    "SmallestShapes",
    "Task",
    "Unpickle",
    "UsualShapes",
    "compile_command",
    "missed_gate",
    "show_bundle",
]


class Backend(StrEnum):
    """What an engine can be written for."""

    ONNX = "onnx"
    AOTI = "aoti"
    PT2 = "pt2"
    TENSORRT = "tensorrt"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A torch.export archive (.pt2, .pt), a `file.py:factory`, a Hugging Face folder (with --task), "
        "or a pickled module (with --allow-pickle).",
        show_default=False,
    ),
]
Inputs = Annotated[
    list[str] | None, typer.Option("--input", metavar="NAME=DTYPE[DIMS]", help="An input, where the model has none.")
]
Dynamic = Annotated[
    list[str] | None, typer.Option("--dynamic", metavar="NAME:AXIS=MIN..MAX", help="An axis that stays dynamic.")
]
SmallestShapes = Annotated[str | None, typer.Option(metavar="NAME:1x3x224x224,...", help="Smallest shapes.")]
UsualShapes = Annotated[str | None, typer.Option(metavar="NAME:8x3x224x224,...", help="Typical shapes.")]
LargestShapes = Annotated[str | None, typer.Option(metavar="NAME:32x3x224x224,...", help="Largest shapes.")]
Task = Annotated[str | None, typer.Option(help="What a Hugging Face model is for, such as image-classification.")]
Unpickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Load a pickled module: this runs code from the file, so trust it first.")
]


def compile_command(
    model: Model,
    policy: Annotated[
        str | None,
        typer.Option("--policy", "-p", help="A policy file, a preset's name, or `none`.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder for the bundle.", show_default=False)
    ] = None,
    backend: Annotated[
        list[Backend] | None, typer.Option(help="An engine to write; repeatable. Default: onnx.")
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(
            "--calib",
            metavar="PATH",
            help="Data to measure on: images, texts (decoders: a .txt or a folder of them), or .npz files.",
        ),
    ] = None,
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    min_shapes: SmallestShapes = None,
    opt_shapes: UsualShapes = None,
    max_shapes: LargestShapes = None,
    opset: Annotated[int, typer.Option(help="ONNX opset of the engine.")] = 18,
    dtype: Annotated[str | None, typer.Option(help="Floating-point type of the engine, such as float16.")] = None,
    atol: Annotated[float | None, typer.Option(help="Absolute tolerance of the parity check.")] = None,
    rtol: Annotated[float | None, typer.Option(help="Relative tolerance of the parity check.")] = None,
    device: Annotated[str, typer.Option(help="What the aoti backend compiles for: cpu or cuda.")] = "cpu",
    aoti_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Of the aoti backend, such as freezing=false or max_autotune=true."),
    ] = None,
    tensorrt_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Of the tensorrt backend, such as plugins=true."),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate", metavar="CONDITION", help="Fail unless it holds: 'top1_agreement>=0.98', 'speedup>=1.2'."
        ),
    ] = None,
    task: Task = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan only: show what would happen, write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing bundle.")] = False,
    keep_baseline: Annotated[
        bool, typer.Option("--keep-baseline", help="Keep the engine without reduction, to compare with.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of random inputs and of the order of timed runs.")] = 0,
    allow_pickle: Unpickle = False,
    no_calibrate: Annotated[
        bool, typer.Option("--no-calibrate", help="Skip measuring: no latency, no fidelity; parity is always checked.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compile a model with a policy into a bundle: engines, report, manifest."""
    out = Output(json=json, quiet=quiet, verbose=verbose)
    with out.running():
        shapes = shape_range(min_shapes, opt_shapes, max_shapes)
        loading: dict[str, Any] = {
            "inputs": tuple(inputs or ()),
            "dynamic": tuple(dynamic or ()),
            "task": task,
            "allow_pickle": allow_pickle,
        }
        if policy is None:
            _advise(out, model, loading)
        if output is None and not dry_run:
            raise UsageError("--output is missing", help="for instance `-o out/`; or look first with --dry-run")
        if no_calibrate and (calib is not None or gate):
            raise UsageError("--no-calibrate forbids what --calib and --gate need", help="leave one of them out")
        from tokcc import pipeline

        result: Any = pipeline.compile(
            model,
            policy,
            **loading,
            backends=tuple(kind.value for kind in backend or [Backend.ONNX]),
            output=output,
            calibration=calib,
            gates=gate or None,
            opset=opset,
            dtype=dtype,
            atol=atol,
            rtol=rtol,
            force=force,
            seed=seed,
            calibrate=not no_calibrate,
            keep_baseline=keep_baseline,
            device=device,
            aoti=_settings("--aoti-option", aoti_option or ()),
            tensorrt=_settings("--tensorrt-option", tensorrt_option or ()),
            shapes=shapes.by_input() if shapes else None,
            dry_run=dry_run,
            progress=out.progress(),
        )
        if dry_run:
            from tokcc.cli.tree import as_tree

            plan = result.to_dict()
            out.data(plan)
            out.show(as_tree("plan", plan))
            return
        show_bundle(out, result)
        missed_gate(result)


def _settings(option: str, given: Iterable[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` options; values are YAML."""
    import yaml

    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"`{value}` is no value", found=str(error).splitlines()[0]) from error
        if not equals or not name.strip():
            raise UsageError(f"{option} is not NAME=VALUE", found=text, help="for instance freezing=false")
    return found


def _advise(out: Output, model: str, loading: dict[str, Any]) -> NoReturn:
    """Say what fits the model, since no policy is given."""
    from tokcc import pipeline
    from tokcc.cli.tree import as_tree

    found = pipeline.inspect(model, **loading, progress=out.progress()).to_dict()
    out.show(as_tree("presets", found.get("presets", found)))
    raise UsageError("--policy is missing", help="choose a preset above: `--policy NAME`, or write a policy file")


def show_bundle(out: Output, bundle: Bundle) -> None:
    """Print what a compile or a calibration gave."""
    if bundle.manifest.parts:
        _show_parts(out, bundle)
        return
    report = bundle.report
    out.data(
        {
            "bundle": str(bundle.path),
            "state": bundle.manifest.state,
            "engines": {name: str(bundle.engine(name)) for name in bundle.manifest.backends},
            "report": report.model_dump(mode="json"),
        }
    )
    out.report(report, bundle.path)
    if out.quiet:
        out.plain(str(bundle.path))


def _show_parts(out: Output, bundle: Bundle) -> None:
    """Print the report of each part, and how images come into prompts."""
    manifest = bundle.manifest
    parts = {name: bundle.part(name) for name in manifest.parts}
    media = manifest.media
    out.data(
        {
            "bundle": str(bundle.path),
            "state": manifest.state,
            "engines": {name: {k: str(part.engine(k)) for k in part.manifest.backends} for name, part in parts.items()},
            "media": None if media is None else media.model_dump(mode="json"),
            "reports": {name: part.report.model_dump(mode="json") for name, part in parts.items()},
        }
    )
    for name, part in parts.items():
        if name != "embed_tokens":
            out.show("", f"[bold]{name}[/bold]")
            out.report(part.report, bundle.path)
    if media is not None:
        out.show("", f"{media.tokens} tokens for each {media.unit}, of {media.stock_tokens}")
        if media.refusal is not None:
            out.show(f"stock processors cannot write that number of placeholders: {media.refusal}")
        for edit in media.edits:
            out.show(f"{edit.file}: {edit.field} = {edit.value}")
    for note in manifest.notes:
        out.show(f"note: {note}")
    if out.quiet:
        out.plain(str(bundle.path))


def missed_gate(bundle: Bundle) -> None:
    """Fail when the bundle is marked.

    Raises:
        GateError: A gate was missed; the bundle stays.
    """
    if bundle.manifest.state == "ok":
        return
    missed = [gate for gate in bundle.report.gates if not gate.passed]
    if not missed:
        return
    kind = GateError if bundle.manifest.state == "accuracy_gate_missed" else SpeedGateError
    first = next((gate for gate in missed if (gate.kind == "accuracy") == (kind is GateError)), missed[0])
    raise kind(
        f"{len(missed)} gate{'s' if len(missed) > 1 else ''} missed",
        needed=first.expression,
        found=first.reason or f"{first.value:.4g}" if first.value is not None else first.reason or "not measured",
        help=f"the bundle is kept in `{bundle.path}`, marked `{bundle.manifest.state}`; try a larger budget",
    )
