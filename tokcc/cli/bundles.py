"""Commands on an existing bundle: verify, bench, report, calibrate."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from tokcc.cli.compile import missed_gate, show_bundle
from tokcc.cli.output import Json, Output, Quiet, Verbose
from tokcc.errors import ParityError, UsageError

__all__ = ["bench", "calibrate", "report", "verify"]

BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="The folder that `tokcc compile -o` wrote.", show_default=False)
]
Seed = Annotated[int, typer.Option(help="Seed of random inputs and of the order of timed runs.")]


def verify(
    bundle: BundlePath,
    atol: Annotated[float | None, typer.Option(help="Absolute tolerance of the parity check.")] = None,
    rtol: Annotated[float | None, typer.Option(help="Relative tolerance of the parity check.")] = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check hashes, structure, and that the engine equals its reference on fresh inputs."""
    out = Output(json=json, quiet=quiet, verbose=verbose)
    with out.running():
        from tokcc.backends.bundle import Bundle

        opened = Bundle.open(bundle)
        opened.verify()
        from tokcc import pipeline
        from tokcc.cli.summary import parity_table

        parity = pipeline.verify(opened, atol=atol, rtol=rtol, seed=seed, progress=out.progress())
        files = len(opened.manifest.files)
        out.data({"bundle": str(bundle), "files": files, "parity": parity.model_dump(mode="json")})
        out.show(f"{files} files have the hashes of the manifest", parity_table(parity))
        if not parity.passed:
            worst = next(check for check in parity.checks if not check.passed)
            raise ParityError(
                f"the engine `{worst.engine}` differs from its reference",
                node=f"output `{worst.output}`",
                needed=f"|difference| <= {worst.atol:g} + {worst.rtol:g} * |reference|",
                found=f"{worst.max_abs_diff:.3g}",
            )


def bench(
    bundle: BundlePath,
    against: Annotated[
        Path | None,
        typer.Option(metavar="ENGINE", help="An engine to compare with; by default the bundle's baseline."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Whose engine, `onnx` or `aoti`; by default the first.", show_default=False)
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each engine.")] = 30,
    threads: Annotated[int, typer.Option(min=0, help="Threads for the runtime; 0 = its default.")] = 0,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size, where the engine's is dynamic.")] = None,
    part: Annotated[
        str | None, typer.Option(help="Of a bundle of several parts, such as `decoder`.", show_default=False)
    ] = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure latency, throughput and peak memory: the engines take turns, medians and ratios with their spread."""
    out = Output(json=json, quiet=quiet, verbose=verbose)
    with out.running():
        from tokcc import pipeline
        from tokcc.backends.bundle import Bundle
        from tokcc.cli.summary import latency_lines
        from tokcc.report.terminal import contexts_table, prompts_table

        if against is not None and not against.is_file():
            raise UsageError(f"there is no engine `{against}`", needed="an ONNX file or an aoti package")
        measured = pipeline.bench(
            Bundle.open(bundle) if part is None else Bundle.open(bundle).part(part),
            against=against,
            backend=backend,
            runs=runs,
            threads=threads,
            batch=batch,
            seed=seed,
            progress=out.progress(),
        )
        out.data(measured.to_dict())
        out.show(*latency_lines(measured.latency))
        if measured.decoding is not None:
            if measured.decoding.prompts:
                out.show("", prompts_table(measured.decoding))
            out.show("", contexts_table(measured.decoding), *measured.notes)
        if measured.memory is not None:
            before, after = measured.memory.baseline_bytes, measured.memory.engine_bytes
            out.show(f"peak memory {before / 2**20:.0f} MiB -> {after / 2**20:.0f} MiB ({measured.memory.how})")


def report(
    bundle: BundlePath,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Write report.html and its pictures again.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the report of a bundle; rebuild it when it is missing."""
    out = Output(json=json, quiet=quiet, verbose=verbose)
    with out.running():
        from tokcc.backends.bundle import Bundle
        from tokcc.cli.summary import fidelity_table

        opened = Bundle.open(bundle)
        if opened.manifest.parts:
            show_bundle(out, opened)
            for name in opened.manifest.parts:
                out.plain(str(opened.part(name).path / "report.html"))
            return
        page = opened.path / "report.html"
        if rebuild or not page.is_file():
            from tokcc import pipeline

            opened = pipeline.rebuild_report(opened, progress=out.progress())
        content = opened.report
        out.data(content.model_dump(mode="json"))
        out.report(content, opened.path)
        if content.fidelity is not None:
            out.show("", fidelity_table(content.fidelity))
        out.plain(str(page))
        if open_ and not webbrowser.open(page.resolve().as_uri()):
            out.note("no browser could be opened; open the file above yourself")


def calibrate(
    bundle: BundlePath,
    data: Annotated[
        Path, typer.Option("--data", metavar="PATH", help="Images, texts, or .npz files.", show_default=False)
    ],
    gate: Annotated[
        list[str] | None, typer.Option("--gate", metavar="CONDITION", help="Fail unless it holds: 'cosine>=0.98'.")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure an existing bundle on new data; report and gates are renewed, the engines stay."""
    out = Output(json=json, quiet=quiet, verbose=verbose)
    with out.running():
        from tokcc import pipeline
        from tokcc.backends.bundle import Bundle

        renewed = pipeline.calibrate(Bundle.open(bundle), data, gates=gate or None, seed=seed, progress=out.progress())
        show_bundle(out, renewed)
        missed_gate(renewed)
