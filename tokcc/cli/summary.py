"""Small tables of single commands; the one that a compile ends with is :mod:`tokcc.report.terminal`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

from tokcc.report.summary import shapes_text

if TYPE_CHECKING:
    from tokcc.report.schema import Fidelity, Latency, Parity

__all__ = ["fidelity_table", "latency_lines", "parity_table"]


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
    shapes = shapes_text(latency.shapes)
    order = "interleaved" if latency.interleaved else "one after the other"
    yield f"{latency.runs} runs each, {order}; {latency.runtime}, threads {latency.threads or 'default'}; {shapes}"
