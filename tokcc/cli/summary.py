"""The table at the end of a compile, for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from tokcc.backends.bundle import Bundle
    from tokcc.report.schema import Fidelity, Latency, Parity, Report

__all__ = ["fidelity_table", "latency_lines", "layer_table", "parity_table", "total_lines"]


def layer_table(report: Report) -> Table:
    """Return one row for each block where a step acts, and one line for each run of blocks where none does."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layer", "step", "site", "tokens", "GFLOPs", "saved"):
        table.add_column(column, justify="right" if column in ("GFLOPs", "saved") else "left")
    for row in report.layers:
        before, after = row.flops_before, row.flops_after
        tokens = f"{row.tokens_in} → {row.tokens_out}" if row.tokens_in != row.tokens_out else f"{row.tokens_in}"
        saved = f"{1 - after / before:.0%}" if before else "-"
        flops = f"{before / 1e9:.3f} → {after / 1e9:.3f}"
        table.add_row(str(row.layer), row.step or "-", row.site or "-", tokens, flops, saved)
    return table


def total_lines(report: Report, bundle: Bundle) -> Iterable[str]:
    """Yield what was gained, what it costs, where it is and what to run next."""
    totals = report.totals
    if totals.ideal_speedup is not None:
        yield f"ideal speedup     {totals.ideal_speedup:.2f}x (FLOPs)"
    if totals.realised_speedup is not None:
        spread = totals.realised_speedup
        yield f"realised speedup  {spread.median:.2f}x (p10 {spread.p10:.2f}, p90 {spread.p90:.2f}, interleaved runs)"
    yield f"parity            {_parity(report.parity)}"
    if report.fidelity is None:
        yield "fidelity          not measured: pass --calib PATH, or run `tokcc calibrate`"
    else:
        yield from (f"fidelity          {line}" for line in _fidelity(report.fidelity))
    for gate in report.gates:
        value = "not measured" if gate.value is None else f"{gate.value:.4g}"
        yield f"gate              {'held' if gate.passed else 'MISSED'}: {gate.expression} ({gate.reason or value})"
    yield from (f"warning           {warning}" for warning in report.warnings)
    yield f"bundle            {bundle.path}"
    for name in bundle.manifest.backends:
        yield f"  {name:<15} {bundle.engine(name)}"
    yield f"next              tokcc report {bundle.path} --open"


def parity_table(parity: Parity) -> Table:
    """Return one row for each output of each engine."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("engine", "output", "largest difference", "tolerance", "passed"):
        table.add_column(column)
    for check in parity.checks:
        tolerance = f"{check.atol:g} + {check.rtol:g} * |reference|"
        passed = "yes" if check.passed else "NO"
        table.add_row(check.engine, check.output, f"{check.max_abs_diff:.3g}", tolerance, passed)
    return table


def fidelity_table(fidelity: Fidelity) -> Table:
    """Return one row for each output that was compared with the baseline's."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("output", "cosine", "relative error", "top-1 agreement", "KL"):
        table.add_column(column)
    for output in fidelity.outputs:
        values = (output.cosine_mean, output.relative_error_mean, output.top1_agreement, output.kl)
        table.add_row(output.output, *("-" if value is None else f"{value:.4f}" for value in values))
    return table


def latency_lines(latency: Latency) -> Iterable[str]:
    """Yield times, throughput and the ratio with its spread."""
    for name, timing in (("baseline", latency.baseline), ("engine", latency.engine)):
        line = f"{name:<10}{timing.median * 1e3:9.2f} ms  (p10 {timing.p10 * 1e3:.2f}, p90 {timing.p90 * 1e3:.2f})"
        if latency.batch_size and timing.median > 0:
            line += f"  {latency.batch_size / timing.median:.1f} samples/s"
        yield line
    spread = latency.speedup
    yield f"{'speedup':<10}{spread.median:9.2f}x     (p10 {spread.p10:.2f}, p90 {spread.p90:.2f})"
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in latency.shapes.items())
    order = "interleaved" if latency.interleaved else "one after the other"
    yield f"{latency.runs} runs each, {order}; {latency.runtime}, threads {latency.threads or 'default'}; {shapes}"


def _parity(parity: Parity) -> str:
    if not parity.passed:
        return "FAILED"
    largest = parity.max_abs_diff
    return "passed" + ("" if largest is None else f", largest difference {largest:.2g}")


def _fidelity(fidelity: Fidelity) -> Iterable[str]:
    for output in fidelity.outputs:
        parts = [
            f"{label} {value:.4f}"
            for label, value in (
                ("cosine", output.cosine_mean),
                ("top-1 agreement", output.top1_agreement),
                ("KL", output.kl),
                ("relative error", output.relative_error_mean),
            )
            if value is not None
        ]
        yield f"{output.output}: {', '.join(parts) or 'no measure fits'} ({output.samples} samples)"
    for metric in fidelity.metrics:
        yield f"{metric.name} of {metric.output}: {metric.before:.4f} before, {metric.after:.4f} after"
