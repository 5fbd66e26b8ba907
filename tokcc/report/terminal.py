"""The table that a compile ends with."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokcc.report.contexts import break_even_text, context_rows, needle_total, prompt_rows, text_rows
from tokcc.report.schema import Decoding, GateResult, Report
from tokcc.report.summary import (
    Row,
    count_text,
    fidelity_lines,
    grouped_rows,
    next_steps,
    percent,
    shapes_text,
    speed_lines,
)

__all__ = ["contexts_table", "print_report", "prompts_table", "renderable", "to_text"]

_TEXT_WIDTH = 110


def print_report(report: Report, *, bundle: str | Path, console: Console | None = None) -> None:
    """Print the summary; on anything but a terminal without colours and frames."""
    console = console or Console()
    if console.is_terminal:
        console.print(renderable(report, bundle=bundle))
    else:
        console.file.write(to_text(report, bundle=bundle))


def to_text(report: Report, *, bundle: str | Path) -> str:
    """Return the summary as plain lines, for logs and files."""
    stream = StringIO()
    console = Console(file=stream, width=_TEXT_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(renderable(report, bundle=bundle, plain=True), soft_wrap=True)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def renderable(report: Report, *, bundle: str | Path, plain: bool = False) -> RenderableType:
    """Return the summary for a rich console.

    Args:
        report: What to show.
        bundle: The bundle's path as the user wrote it.
        plain: Without frames, for text.
    """
    parts: list[RenderableType] = []
    if report.layers:
        parts += [_layers(report, plain), Text("")]
    if report.decoding is not None and report.decoding.points:
        parts += [contexts_table(report.decoding, plain=plain), Text("")]
    if report.decoding is not None and report.decoding.prompts:
        parts += [prompts_table(report.decoding, plain=plain), Text("")]
    if report.decoding is not None and report.decoding.text:
        parts += [_texts(report.decoding, plain), Text("")]
    parts.append(_totals(report, str(bundle)))
    for gate in report.gates:
        parts.append(_gate(gate))
    for warning in report.warnings:
        parts.append(Text.assemble(("warning  ", "bold yellow"), warning))
    parts += [Text(""), Text("next", style="bold")]
    parts.append(_next(report, str(bundle)))
    return Group(*parts)


def _next(report: Report, bundle: str) -> Table:
    grid = Table.grid(padding=(0, 2))
    steps = next_steps(report, bundle)
    grid.add_column(no_wrap=True)
    grid.add_column(style="dim", overflow="fold")
    for step in steps:
        if step.command:
            grid.add_row(Text("  " + step.command), Text(step.what))
    advice = [Text("  " + step.what) for step in steps if not step.command]
    outer = Table.grid()
    for line in advice:
        outer.add_row(line)
    outer.add_row(grid)
    return outer


def _layers(report: Report, plain: bool) -> Table:
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=not plain, header_style="bold", padding=(0, 1))
    rows = grouped_rows(report.layers)
    widths = max(len(str(row.tokens_in)) for row in rows), max(len(str(row.tokens_out)) for row in rows)
    with_kv = any(row.kv_before is not None for row in rows)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("step", no_wrap=True, overflow="ellipsis", max_width=28)
    table.add_column("tokens in -> out", justify="right", no_wrap=True)
    table.add_column("FLOPs before -> after", justify="right", no_wrap=True)
    table.add_column("saved", justify="right", no_wrap=True)
    if with_kv:
        table.add_column("KV cache", justify="right", no_wrap=True)
    for row in rows:
        cells: list[str | Text] = [
            row.layers,
            Text(row.step or "-"),
            _tokens(row, widths),
            f"{count_text(row.flops_before)} -> {count_text(row.flops_after)}",
            "-" if row.saved is None else percent(row.saved, digits=0),
        ]
        if with_kv:
            cells.append(_kv(row))
        table.add_row(*cells, style="" if row.step else "dim")
    totals = report.totals
    table.add_section()
    saved = 1 - totals.flops_after / totals.flops_before if totals.flops_before else None
    table.add_row(
        "model",
        "",
        "",
        f"{count_text(totals.flops_before)} -> {count_text(totals.flops_after)}",
        "-" if saved is None else percent(saved, digits=0),
        *([""] if with_kv else []),
        style="bold",
    )
    return table


def contexts_table(decoding: Decoding, *, plain: bool = True) -> Table:
    """Return one row for each context at which a decoder was timed."""
    table = _table(plain, "context", "tokens/s", "speedup", "first token", "KV cache", "left", "by bytes moved")
    for row in context_rows(decoding):
        pairs = [" -> ".join(pair) for pair in (row.speed, row.first_token, row.cache)]
        table.add_row(row.context, pairs[0], row.speedup, *pairs[1:], row.left, row.bound)
    return table


def prompts_table(decoding: Decoding, *, plain: bool = True) -> Table:
    """Return one row for each length of prompts that was timed."""
    table = _table(plain, "prompt", "in one call", "speedup")
    for row in prompt_rows(decoding):
        table.add_row(row.tokens, " -> ".join(row.seconds), row.speedup)
    return table


def _texts(decoding: Decoding, plain: bool) -> Table:
    table = _table(plain, "tokens of text", "perplexity", "ratio", "same top-1", "KL (nats)")
    for row in text_rows(decoding):
        table.add_row(row.context, " -> ".join(row.perplexity), row.ratio, row.top1, row.kl)
    return table


def _table(plain: bool, *columns: str) -> Table:
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=not plain, header_style="bold", padding=(0, 1))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _tokens(row: Row, widths: tuple[int, int]) -> Text:
    before, after = str(row.tokens_in), str(row.tokens_out)
    if before == after:
        return Text(before + " " * (widths[1] + 4))  # in the column of those that enter
    return Text(f"{before} -> {after:>{widths[1]}}")


def _kv(row: Row) -> str:
    if row.kv_before is None or row.kv_after is None:
        return "-"
    return f"{count_text(row.kv_before)}B -> {count_text(row.kv_after)}B"


def _totals(report: Report, bundle: str) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in speed_lines(report):
        grid.add_row(label, Text(value, style=_speed_style(report) if label == "realised speedup" else ""))
    if report.decoding is not None:
        grid.add_row("break-even", Text(break_even_text(report.decoding)))
    for label, value in fidelity_lines(report):
        grid.add_row(label, Text(value))
    needles = None if report.decoding is None else needle_total(report.decoding)
    if needles is not None:
        grid.add_row("copied needles", Text(f"{' -> '.join(needles)} of the tokens of random spans that come again"))
    grid.add_row("fidelity on", _fidelity_source(report))
    grid.add_row("parity", _parity(report))
    if report.latency is not None:
        latency = report.latency
        how = f"{latency.runs} interleaved runs, {latency.threads or 'default'} threads, {latency.runtime}"
        grid.add_row("measured", Text(f"{how}, {shapes_text(latency.shapes)}"))
    grid.add_row("bundle", Text(bundle, style="bold cyan"))
    return grid


def _speed_style(report: Report) -> str:
    return "bold green" if report.latency is not None and report.latency.speedup.p10 > 1 else "bold yellow"


def _fidelity_source(report: Report) -> Text:
    if report.fidelity is None:
        return Text("not measured (no calibration data)", style="yellow")
    what = "tokens" if report.decoding is not None else "samples"
    text = f"{report.fidelity.source}, {report.fidelity.samples} {what}, against the baseline engine"
    if report.fidelity.weights == "random":
        text += "; random weights, so this says nothing about a trained model"
    return Text(text)


def _parity(report: Report) -> Text:
    parity = report.parity
    if not parity.passed:
        return Text("FAILED", style="bold red")
    worst = parity.max_abs_diff
    difference = "" if worst is None else f", largest difference {worst:.2g}"
    return Text(f"passed on {parity.batches} batches against the {parity.reference}{difference}")


def _gate(gate: GateResult) -> Text:
    value = gate.reason if gate.value is None else f"{gate.value:.4g}" + (f" ({gate.reason})" if gate.reason else "")
    mark, style = ("gate met  ", "bold green") if gate.passed else ("gate MISSED  ", "bold red")
    return Text.assemble((mark, style), f"{gate.expression}: {value}")
