from __future__ import annotations

from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.report import samples
from tokcc.report.schema import GateResult, OutputFidelity, Parity, Totals
from tokcc.report.summary import bytes_text, count_text, grouped_rows, next_steps, percent, seconds_text
from tokcc.report.terminal import print_report, renderable, to_text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (999.6, "1 K"), (1234567, "1.23 M"), (11.5e9, "11.5 G"), (4.2e15, "4.2 P")],
)
def test_counts(value: float, text: str) -> None:
    assert count_text(value) == text


@given(st.integers(0, 10**17))
def test_counts_keep_three_digits(value: int) -> None:
    number, _, unit = count_text(value).partition(" ")
    factor = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}[unit]
    assert float(number) * factor == pytest.approx(value, rel=0.006)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0676, "67.6 ms"), (2.5, "2.5 s"), (3e-5, "30 µs"), (1e-8, "10 ns"), (0, "0 ns"), (1234, "1234 s")],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds_text(value) == text


def test_bytes() -> None:
    assert [bytes_text(value) for value in (12, 412_000_000)] == ["12 B", "412 MB"]


def test_percent_never_claims_all() -> None:
    assert percent(0.99999) == "99.9 %"
    assert percent(0.999, digits=0) == "99 %"
    assert percent(1.0) == "100.0 %"
    assert percent(-0.02) == "-2.0 %"


def test_blocks_without_a_step_become_one_line() -> None:
    rows = [
        row.model_copy(update={"step": "", "tokens_in": 197, "tokens_out": 197}) if row.layer < 4 else row
        for row in samples.rows()
    ]
    grouped = grouped_rows(rows)
    assert [row.layers for row in grouped] == ["0-3", *map(str, range(4, 12))]
    assert grouped[0].flops_before == sum(row.flops_before for row in rows[:4])
    assert sum(row.flops_after for row in grouped) == sum(row.flops_after for row in rows)
    assert grouped_rows([]) == []


def test_text_has_the_numbers_and_no_escape_codes() -> None:
    text = to_text(samples.report(), bundle="out/")
    for part in (
        "197 -> 184",
        "1.61x",
        "ideal speedup",
        "98.4 %",
        "0.9931",
        "parity",
        "out/",
        "gate met",
        "warning",
        "tokcc verify out/",
    ):
        assert part in text
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_text_says_what_was_not_measured_and_what_failed() -> None:
    missed = GateResult(
        expression="speedup>=2",
        metric="speedup",
        kind="speed",
        threshold=2,
        value=None,
        passed=False,
        reason="not measured",
    )
    bare = samples.report(fidelity=None, latency=None, memory=None, gates=(missed,), layers=(), totals=Totals.of(0, 0))
    text = to_text(bare, bundle="out")
    assert "realised speedup  not measured" in text
    assert "no calibration data" in text
    assert "gate MISSED  speedup>=2: not measured" in text
    assert "tokcc calibrate out --data DATA" in text
    failed = samples.report(fidelity=None, latency=None, memory=None, parity=Parity(passed=False, batches=1))
    assert "FAILED" in to_text(failed, bundle="out")


def test_dynamic_shapes_and_kv_bytes_are_shown() -> None:
    row = samples.rows()[0].model_copy(
        update={"tokens_in": "s0", "tokens_out": "s0 - 13", "kv_bytes_before": 4_000_000, "kv_bytes_after": 1_000_000}
    )
    text = to_text(samples.report(layers=(row,)), bundle="out")
    assert "s0 -> s0 - 13" in text
    assert "4 MB -> 1 MB" in text


def test_names_are_not_taken_for_markup() -> None:
    row = samples.rows()[0].model_copy(update={"step": "[bold]x[/bold]"})
    text = to_text(samples.report(layers=(row,), warnings=("[red]careful[/red]",)), bundle="[blue]out")
    for part in ("[bold]x[/bold]", "[red]careful[/red]", "[blue]out"):
        assert part in text


def test_a_terminal_gets_a_table_and_a_pipe_gets_text() -> None:
    terminal, pipe = StringIO(), StringIO()
    print_report(samples.report(), bundle="out", console=Console(file=terminal, force_terminal=True, width=80))
    print_report(samples.report(), bundle="out", console=Console(file=pipe, width=80))
    assert "\x1b[" in terminal.getvalue()
    assert pipe.getvalue() == to_text(samples.report(), bundle="out")


@pytest.mark.parametrize("width", [40, 60, 200])
def test_narrow_terminals_do_not_break(width: int) -> None:
    stream = StringIO()
    Console(file=stream, force_terminal=True, width=width).print(renderable(samples.report(), bundle="out"))
    assert "1.61x" in stream.getvalue()


def test_next_steps_follow_the_state() -> None:
    done = [step.command for step in next_steps(samples.report(), "out")]
    assert done == ["tokcc verify out", "tokcc bench out", "tokcc report out"]
    gates = [
        GateResult(expression="g", metric="m", kind=kind, threshold=1, value=0, passed=False)
        for kind in ("accuracy", "speed")
    ]
    slow = samples.report(gates=gates, latency=samples.latency(0.8))
    advice = [step.what for step in next_steps(slow, "out") if not step.command]
    assert len(advice) == 3
    assert "slower here" in advice[2]


def test_nan_is_not_hidden() -> None:
    broken = OutputFidelity(output="logits", samples=0, nonfinite_samples=4)
    fidelity = samples.fidelity().model_copy(update={"outputs": (broken,), "metrics": ()})
    assert "NaN or infinity   4 samples" in to_text(samples.report(fidelity=fidelity), bundle="out")
