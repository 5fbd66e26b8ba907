"""What a report says in a few words: shared by the terminal and the HTML page, so that both say the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokcc.report.schema import Fidelity, LayerRow, OutputFidelity, Report, Size, Spread

__all__ = [
    "NextStep",
    "Row",
    "bytes_text",
    "count_text",
    "fidelity_lines",
    "grouped_rows",
    "next_steps",
    "percent",
    "sampled",
    "seconds_text",
    "shapes_text",
    "speed_lines",
    "spread_text",
    "times",
    "worst",
]

_PAST = "past_key_values."
_UNITS = ("", " K", " M", " G", " T", " P")


def count_text(value: float, *, digits: int = 3) -> str:
    """Format a large count with a decimal unit: 1234567 -> ``1.23 M``."""
    scaled, unit = float(value), 0
    while abs(scaled) >= 999.5 and unit < len(_UNITS) - 1:
        scaled, unit = scaled / 1000, unit + 1
    return f"{scaled:.{digits}g}{_UNITS[unit]}"


def bytes_text(value: float) -> str:
    """Format bytes with a decimal unit: 412000000 -> ``412 MB``."""
    text = count_text(value)
    return text + "B" if " " in text else text + " B"


def seconds_text(value: float) -> str:
    """Format seconds with three digits and a fitting unit: 0.0676 -> ``67.6 ms``."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}" if value < 1000 else f"{value:.0f} s"
    return f"{value * 1e9:.3g} ns"


def percent(value: float, *, digits: int = 1) -> str:
    """Format a fraction: 0.984 -> ``98.4 %``; what is not quite all is never rounded to 100 %."""
    text = f"{value * 100:.{digits}f}"
    if float(text) == 100 and value < 1:
        text = f"{100 - 10**-digits:.{digits}f}"
    return f"{text} %"


def times(value: float) -> str:
    """Format a ratio: 1.613 -> ``1.61x``."""
    return f"{value:.2f}x"


def spread_text(spread: Spread) -> str:
    """Format a measured ratio with its spread: ``1.61x (1.53x to 1.67x)``."""
    return f"{times(spread.median)} ({times(spread.p10)} to {times(spread.p90)})"


def shapes_text(shapes: dict[str, tuple[int, ...]]) -> str:
    """Format input shapes: ``pixel_values [1, 3, 224, 224]``; the caches of a decoder are only counted."""
    caches = [name for name in shapes if name.startswith(_PAST)]
    named = [f"{name} [{', '.join(map(str, shape))}]" for name, shape in shapes.items() if name not in caches]
    return ", ".join([*named, *([f"{len(caches)} cache tensors"] if caches else [])])


def sampled(report: Report) -> str:
    """Say what fidelity was measured on: ``64 samples of photos``, for decoders ``4096 tokens of a text``."""
    assert report.fidelity is not None
    what = "tokens" if report.decoding is not None else "samples"
    return f"{report.fidelity.samples} {what} of {report.fidelity.source}"


@dataclass(frozen=True)
class Row:
    """A line of the layer table: one step, or a run of blocks where nothing happens."""

    layers: str
    step: str
    site: str
    tokens_in: Size
    tokens_out: Size
    flops_before: int
    flops_after: int
    bytes_before: int
    bytes_after: int
    kv_before: int | None
    kv_after: int | None

    @property
    def saved(self) -> float | None:
        """Fraction of the FLOPs that is saved."""
        return 1 - self.flops_after / self.flops_before if self.flops_before else None

    @property
    def left(self) -> float | None:
        """Fraction of the entering tokens that leaves, where both are numbers."""
        if isinstance(self.tokens_in, int) and isinstance(self.tokens_out, int) and self.tokens_in:
            return self.tokens_out / self.tokens_in
        return None


def grouped_rows(layers: Sequence[LayerRow]) -> list[Row]:
    """Return the layer table; neighbouring blocks where the same is left, or nothing is done, become one line."""
    rows: list[Row] = []
    run: list[LayerRow] = []
    for layer in layers:
        if run and not _alike(run[0], layer):
            rows.append(_row(run))
            run = []
        run.append(layer)
    if run:
        rows.append(_row(run))
    return rows


def _alike(one: LayerRow, other: LayerRow) -> bool:
    if one.kv_bytes_before is not None:  # caches: every layer has its own, and none hands tokens to the next
        keys = ("step", "tokens_in", "tokens_out", "kv_bytes_before", "kv_bytes_after")
        return all(getattr(one, key) == getattr(other, key) for key in keys)
    return not one.step and not other.step and one.tokens_in == other.tokens_in


def _row(run: Sequence[LayerRow]) -> Row:
    first, last = run[0], run[-1]
    return Row(
        layers=str(first.layer) if first.layer == last.layer else f"{first.layer}-{last.layer}",
        step=first.step,
        site=first.site,
        tokens_in=first.tokens_in,
        tokens_out=last.tokens_out,
        flops_before=sum(row.flops_before for row in run),
        flops_after=sum(row.flops_after for row in run),
        bytes_before=sum(row.bytes_before for row in run),
        bytes_after=sum(row.bytes_after for row in run),
        kv_before=_total(row.kv_bytes_before for row in run),
        kv_after=_total(row.kv_bytes_after for row in run),
    )


def _total(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def worst(fidelity: Fidelity) -> OutputFidelity | None:
    """Return the output with the smallest mean cosine, or None when no output was compared."""
    compared = [output for output in fidelity.outputs if output.cosine_mean is not None]
    return min(compared, key=lambda output: output.cosine_mean or 0.0, default=None)


def speed_lines(report: Report) -> list[tuple[str, str]]:
    """Return labelled lines about speed, the most important first."""
    totals, latency = report.totals, report.latency
    lines: list[tuple[str, str]] = []
    if latency is None:
        lines.append(("realised speedup", "not measured"))
    else:
        how = f"{seconds_text(latency.baseline.median)} -> {seconds_text(latency.engine.median)}"
        lines.append(("realised speedup", f"{spread_text(latency.speedup)}, {how}"))
    for backend, other in report.further.items():
        how = f"{seconds_text(other.baseline.median)} -> {seconds_text(other.engine.median)}"
        lines.append((f"of the {backend} engine", f"{spread_text(other.speedup)}, {how}"))
    if totals.ideal_speedup is not None:
        flops = f"{count_text(totals.flops_before)} -> {count_text(totals.flops_after)} FLOPs"
        lines.append(("ideal speedup", f"{times(totals.ideal_speedup)}, {flops}"))
    if totals.realised_over_ideal is not None:
        lines.append(("realised / ideal", percent(totals.realised_over_ideal, digits=0)))
    if totals.inserted_seconds is not None:
        share = "" if totals.inserted_share is None else f" ({percent(totals.inserted_share)} of a run)"
        lines.append(("inserted nodes", f"{seconds_text(totals.inserted_seconds)}{share}"))
    if report.memory is not None:
        memory = report.memory
        lines.append(("peak memory", f"{bytes_text(memory.baseline_bytes)} -> {bytes_text(memory.engine_bytes)}"))
    if report.nodes is not None:
        lines.append(("graph nodes", f"{report.nodes.baseline} -> {report.nodes.engine}"))
    return lines


def fidelity_lines(report: Report) -> list[tuple[str, str]]:
    """Return labelled lines about fidelity, the most important first."""
    fidelity = report.fidelity
    if fidelity is None:
        return []
    lines = [
        (f"{metric.name}", f"{_metric_value(metric.name, metric.before)} -> {_metric_value(metric.name, metric.after)}")
        for metric in fidelity.metrics
    ]
    tops = [output.top1_agreement for output in fidelity.outputs if output.top1_agreement is not None]
    if tops:
        lines.append(("top-1 agreement", percent(min(tops))))
    low = worst(fidelity)
    if low is not None and low.cosine_mean is not None and low.cosine_min is not None:
        where = f", output {low.output}" if len(fidelity.outputs) > 1 else ""
        lines.append(("cosine", f"{low.cosine_mean:.4f} (worst sample {low.cosine_min:.4f}{where})"))
        if low.relative_error_mean is not None:
            lines.append(("relative error", percent(low.relative_error_mean)))
    divergences = [output.kl for output in fidelity.outputs if output.kl is not None]
    if divergences:
        lines.append(("KL divergence", f"{max(divergences):.3g} nats"))
    broken = sum(output.nonfinite_samples for output in fidelity.outputs)
    if broken:
        lines.append(("NaN or infinity", f"{broken} samples"))
    return lines


def _metric_value(name: str, value: float) -> str:
    return percent(value) if name == "accuracy" else f"{value:.4g}"


@dataclass(frozen=True)
class NextStep:
    """Something to do next: a command and what it is for, or advice without a command."""

    what: str
    command: str = ""


def next_steps(report: Report, bundle: str) -> list[NextStep]:
    """Return what to do next, the most useful first.

    Args:
        report: The report.
        bundle: The bundle's path as the user wrote it.
    """
    steps: list[NextStep] = []
    missed = {gate.kind for gate in report.gates if not gate.passed}
    if "accuracy" in missed:
        steps.append(NextStep("an accuracy gate was missed: keep more tokens, or start reducing at a later layer"))
    if "speed" in missed:
        steps.append(NextStep("a speed gate was missed: keep fewer tokens, or measure at the batch size you serve"))
    if report.latency is not None and report.latency.speedup.median < 1:
        steps.append(NextStep("the engine is slower here: use the original model at this shape, or a larger input"))
    engines = {check.engine for check in report.parity.checks}
    if "tensorrt" in engines:
        steps.append(NextStep("build the TensorRT engine where it will run", f"sh {bundle}/tensorrt/build.sh"))
    if engines == {"tensorrt"}:  # nothing that runs here
        steps.append(NextStep("check its graph again", f"tokcc verify {bundle}"))
    elif any(tensor.name.startswith(_PAST) for tensor in report.model.inputs):
        if report.fidelity is None:
            command = f"tokcc calibrate {bundle} --data TEXT.txt"
            steps.append(NextStep("measure perplexity on your text (after --keep-baseline)", command))
        steps.append(NextStep("try it in the terminal", f'tokcc run {bundle} "Once upon a time"'))
        steps.append(NextStep("check the bundle where it is deployed", f"tokcc verify {bundle}"))
    elif report.fidelity is None:
        steps.append(
            NextStep("measure fidelity on your data (after --keep-baseline)", f"tokcc calibrate {bundle} --data DATA")
        )
    elif not missed:
        steps.append(NextStep("check the bundle where it is deployed", f"tokcc verify {bundle}"))
        steps.append(
            NextStep("measure on the machine that will serve it (after --keep-baseline)", f"tokcc bench {bundle}")
        )
    steps.append(NextStep("open the whole report", f"tokcc report {bundle}"))
    return steps
