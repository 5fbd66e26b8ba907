"""Write the report into a bundle: figures, ``report.json``, ``report.html``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokcc.errors import OutputError
from tokcc.report.contexts import timed_call
from tokcc.report.distances import Array
from tokcc.report.extras import available
from tokcc.report.findings import findings
from tokcc.report.html import write_html
from tokcc.report.kept import KeptTokens, kept_texts, painting
from tokcc.report.schema import Decoding, Figure, Report

__all__ = ["write_report"]

_MISSING = "pip install 'tokcc[report]', then `tokcc report BUNDLE`"


@dataclass(frozen=True)
class _Job:
    """A picture that can be drawn: its files by suffix, and how."""

    figure: Figure
    light: Callable[[], bytes]
    dark: Callable[[], bytes] | None = None


def write_report(
    report: Report,
    folder: str | Path,
    *,
    images: Sequence[Array] = (),
    texts: Sequence[Sequence[str]] = (),
    stages: Sequence[KeptTokens] = (),
    bundle: str | None = None,
) -> Report:
    """Draw the figures and write the report; without the `report` extra write what is possible and say so.

    Args:
        report: The report, without figures and texts.
        folder: The bundle (or its temporary sibling).
        images: Pixels of the samples, for the picture of kept patches.
        texts: Tokens of the samples, for the picture of kept words.
        stages: What became of the tokens of these samples, one entry per reduction.
        bundle: How the user will call the bundle, for commands.

    Returns:
        The report as it was written, with figures, texts, notes, and the warnings that follow from its numbers.

    Raises:
        OutputError: A file cannot be written.
    """
    target = Path(folder)
    notes = list(report.notes)
    # Each once: a report that is written again after a new measurement already has some of them.
    warnings = dict.fromkeys((*report.warnings, *findings(report)))
    if texts and stages:
        report = report.model_copy(update={"texts": kept_texts(texts, stages)})
    if available("matplotlib", "PIL"):
        figures = _draw(_jobs(report, images, stages), target)
        report = report.model_copy(update={"figures": tuple(figures)})
    else:
        notes.append(f"no figures: matplotlib is not installed ({_MISSING})")
    with_page = available("jinja2")
    if not with_page:
        notes.append(f"no report.html: jinja2 is not installed ({_MISSING})")
    report = report.model_copy(update={"notes": tuple(dict.fromkeys(notes)), "warnings": tuple(warnings)})
    report.save(target / "report.json")
    if with_page:
        write_html(report, target, bundle=bundle)
    return report


def _draw(jobs: Sequence[_Job], folder: Path) -> list[Figure]:
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for job in jobs:
            (folder / job.figure.path).write_bytes(job.light())
            if job.dark is not None and job.figure.dark_path is not None:
                (folder / job.figure.dark_path).write_bytes(job.dark())
    except OSError as error:
        raise OutputError("cannot write the figures", found=str(error)) from error
    return [job.figure for job in jobs]


def _jobs(report: Report, images: Sequence[Array], stages: Sequence[KeptTokens]) -> list[_Job]:
    """Return the pictures that this report has the data for."""
    jobs: list[_Job] = []
    layers, latency, points, texts = report.layers, report.latency, report.break_even, report.texts
    from tokcc.report.figures import draw_break_even, draw_kept_images, draw_kept_text, draw_latency, draw_tokens
    from tokcc.report.style import DARK, LIGHT

    # The caches of a decoder are each their own: no layer hands its tokens to the next.
    caches = any(row.kv_bytes_before is not None for row in layers)
    sizes = [] if caches else [tokens for row in layers for tokens in (row.tokens_in, row.tokens_out)]
    if sizes and all(isinstance(tokens, int) for tokens in sizes):
        figure = Figure(
            name="tokens",
            path="figures/tokens.svg",
            dark_path="figures/tokens-dark.svg",
            title="Tokens, block by block",
            caption="Dashed: the original model.",
            alt=f"Step chart: {layers[0].tokens_in} tokens enter, {layers[-1].tokens_out} leave the last block.",
        )
        jobs.append(_Job(figure, lambda: draw_tokens(layers, LIGHT), lambda: draw_tokens(layers, DARK)))
    if latency is not None:
        figure = Figure(
            name="latency",
            path="figures/latency.svg",
            dark_path="figures/latency-dark.svg",
            title=f"Time of {(timed_call(report.decoding) if report.decoding else None) or 'a run'}",
            caption=f"Dots: {latency.runs} interleaved runs. Upright line: median. Across: 10th to 90th percentile.",
            alt=f"Bar chart: median {latency.baseline.median:.4g} s baseline, {latency.engine.median:.4g} s engine.",
        )
        jobs.append(_Job(figure, lambda: draw_latency(latency, LIGHT), lambda: draw_latency(latency, DARK)))
    if report.decoding is not None:
        jobs += _decoder_jobs(report.decoding)
    elif len(points) > 1:
        figure = Figure(
            name="break_even",
            path="figures/break_even.svg",
            dark_path="figures/break_even-dark.svg",
            title="From which shape it pays",
            caption="Right of the dashed line the engine is faster.",
            alt="Dot chart of the speedup: " + ", ".join(f"{p.label} {p.ratio.median:.2f}" for p in points) + ".",
        )
        jobs.append(_Job(figure, lambda: draw_break_even(points, LIGHT), lambda: draw_break_even(points, DARK)))
    pictured = [stage for stage in stages if stage.grid is not None]
    if len(images) and pictured:
        figure = Figure(
            name="kept_images",
            path="figures/kept_images.png",
            title="Patches that are left in a picture",
            caption=painting(pictured),
            alt="Photos of the calibration data, with the patches that remain after some of the blocks.",
            wide=True,
        )
        jobs.append(_Job(figure, lambda: draw_kept_images(images, pictured)))
    if texts:
        # The page shows the words as text; these pictures are for slides and issues.
        figure = Figure(
            name="kept_text",
            path="figures/kept_text.png",
            dark_path="figures/kept_text-dark.png",
            title="Tokens that are left in a text",
            caption=f"Struck-out tokens were {texts[0].how}.",
            alt="Texts of the calibration data, with the tokens that are gone in grey.",
            wide=True,
        )
        jobs.append(_Job(figure, lambda: draw_kept_text(texts, LIGHT), lambda: draw_kept_text(texts, DARK)))
    return jobs


def _decoder_jobs(decoding: Decoding) -> list[_Job]:
    """Return the pictures that only decoders have."""
    jobs: list[_Job] = []
    from tokcc.report.cache_figures import draw_occupancy, draw_speed
    from tokcc.report.style import DARK, LIGHT

    points, occupancy = decoding.points, decoding.occupancy
    if len(points) > 1:
        said = ", ".join(
            f"{p.tokens_per_second_before:.3g} and {p.tokens_per_second_after:.3g} at {p.context}" for p in points
        )
        figure = Figure(
            name="contexts",
            path="figures/contexts.svg",
            dark_path="figures/contexts-dark.svg",
            title="Speed by length of the context",
            caption="Dotted: what the bytes that a step moves would allow, from the speed of the whole cache.",
            alt=f"Line chart of tokens a second, whole cache and engine: {said}.",
        )
        jobs.append(_Job(figure, lambda: draw_speed(points, LIGHT), lambda: draw_speed(points, DARK)))
    if occupancy is not None:
        shares = [sum(row.kept) / len(row.kept) for row in occupancy.layers]
        figure = Figure(
            name="occupancy",
            path="figures/occupancy.png",
            dark_path="figures/occupancy-dark.png",
            title="What the caches keep of a prompt",
            caption=(
                f"A prompt of {occupancy.context} tokens ({decoding.tokens}), read in one call. "
                "The stronger the colour, the more heads of the block still hold the position."
            ),
            alt=f"Heat map of blocks over positions; blocks keep {min(shares):.0%} to {max(shares):.0%} of the prompt.",
            wide=True,
        )
        jobs.append(_Job(figure, lambda: draw_occupancy(occupancy, LIGHT), lambda: draw_occupancy(occupancy, DARK)))
    return jobs
