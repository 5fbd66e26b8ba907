"""Progress: nothing for library calls, plain lines in a log, bars on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tokcc import progress
from tokcc.progress import rich_progress, silent


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=100), text


def test_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with silent().stage("work", 3) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


def test_plain_lines() -> None:
    out, text = console(terminal=False)
    with rich_progress(out).stage("measure [bold]", 2) as advance:
        advance(1)
        advance(1)
    first, last = text.getvalue().splitlines()
    assert first == "measure [bold] ..."
    assert last.startswith("measure [bold]: 0.")


def test_plain_lines_show_life_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    out, text = console(terminal=False)
    with rich_progress(out).stage("measure", 20) as advance:
        advance(5)
    assert "measure: 5/20" in text.getvalue()


def test_a_failed_stage_says_so() -> None:
    out, text = console(terminal=False)
    with pytest.raises(ValueError, match="x"), rich_progress(out).stage("measure"):
        raise ValueError("x")
    assert "measure: stopped after" in text.getvalue()


def test_bars_nest_on_a_terminal() -> None:
    out, text = console(terminal=True)
    bars = rich_progress(out)
    with bars.stage("outer"), bars.stage("inner [x]", 4) as advance:
        advance(4)
    with bars.stage("next", 1) as advance:
        advance(1)
    shown = text.getvalue()
    assert "inner [x]" in shown
    assert "4/4" in shown
    assert "next" in shown


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with rich_progress().stage("work"):
        pass
    assert capsys.readouterr().out == ""
