from __future__ import annotations

from pathlib import Path

import pytest

from tests.report import samples
from tokcc.report.findings import findings
from tokcc.report.schema import OutputFidelity, Report, Spread, Totals
from tokcc.report.write import write_report


def with_speed(median: float, p10: float, p90: float, **totals: object) -> Report:
    latency = samples.latency().model_copy(update={"speedup": Spread(median=median, p10=p10, p90=p90)})
    known = samples.report().totals.model_copy(update=totals)
    return samples.report(latency=latency, totals=known, break_even=())


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (with_speed(1.6, 1.5, 1.7), []),
        (with_speed(0.9, 0.8, 1.1), ["slower than the baseline"]),
        (with_speed(1.1, 0.95, 1.2), ["within the noise"]),
        (with_speed(1.6, 1.2, 2.0), ["noisy"]),
        (with_speed(1.6, 1.5, 1.7, realised_over_ideal=0.5), ["only 50 % of the ideal"]),
        (with_speed(1.6, 1.5, 1.7, inserted_share=0.3), ["inserted nodes take 30 %"]),
    ],
)
def test_speed(report: Report, expected: list[str]) -> None:
    found = findings(report)
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))


def test_shapes_where_the_policy_loses() -> None:
    (loss, gain) = samples.report().break_even
    assert findings(samples.report()) == ("the policy loses at 96x96 (0.94x); it pays from 224x224",)
    assert "does not pay at any" in findings(samples.report(break_even=(loss,)))[0]
    assert findings(samples.report(break_even=(gain,))) == ()


def test_fidelity() -> None:
    broken = OutputFidelity(output="logits", samples=0, nonfinite_samples=4)
    fidelity = samples.fidelity().model_copy(update={"outputs": (broken,), "weights": "random"})
    first, second, *_ = findings(samples.report(fidelity=fidelity))
    assert "NaN or infinity for 4 samples" in first
    assert "weights are random" in second
    bare = samples.report(fidelity=None, latency=None, memory=None, break_even=(), totals=Totals.of(2, 1))
    assert findings(bare) == ()


def test_a_written_report_has_them_once(tmp_path: Path) -> None:
    once = write_report(samples.report(), tmp_path)
    again = write_report(once, tmp_path)
    assert once.warnings == again.warnings == (*samples.report().warnings, *findings(samples.report()))
