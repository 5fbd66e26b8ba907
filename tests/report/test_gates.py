from __future__ import annotations

import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report import samples
from tokcc.errors import UsageError
from tokcc.report.gates import METRICS, evaluate_gates, parse_gates
from tokcc.report.schema import OutputFidelity, Report

OPS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(
    metric=st.sampled_from(sorted(METRICS)),
    op=st.sampled_from(sorted(OPS)),
    value=numbers,
    probe=numbers,
    blanks=st.lists(st.sampled_from(["", " ", "  "]), min_size=4, max_size=4),
)
def test_expressions_are_read_back(metric: str, op: str, value: float, probe: float, blanks: list[str]) -> None:
    text = f"{blanks[0]}{metric}{blanks[1]}{op}{blanks[2]}{value!r}{blanks[3]}"
    (gate,) = parse_gates(text)
    (same,) = parse_gates({metric: f"{op}{blanks[2]}{value!r}"})
    for found in (gate, same):
        assert (found.metric.name, found.op, found.threshold, found.output) == (metric, op, value, None)
        assert found.holds(probe) == OPS[op](probe, value)


@given(st.text(max_size=30))
def test_any_other_text_is_a_usage_error_and_nothing_else(text: str) -> None:
    try:
        gates = parse_gates([text])
    except UsageError:
        return
    assert gates[0].metric.name in METRICS


@pytest.mark.parametrize(
    "text",
    ["", "speedup", "speedup=1.2", "speedup==1.2", ">=1", "speedup>=", "speedup>=fast", "speedup>=nan", "a b>=1"],
)
def test_malformed_expressions(text: str) -> None:
    with pytest.raises(UsageError):
        parse_gates(text)


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean top1_agreement"):
        parse_gates("top1_agreemnt>=0.9")
    with pytest.raises(UsageError, match="did you mean cosine"):
        parse_gates("logits.cosin>=0.9")
    with pytest.raises(UsageError, match="unknown gate metric qqqqq"):
        parse_gates("qqqqq>=0.9")


def test_a_bare_number_bounds_the_sensible_side() -> None:
    cosine, kl = parse_gates({"cosine": 0.98, "kl": "0.1"})
    assert (cosine.op, cosine.threshold, kl.op, kl.threshold) == (">=", 0.98, "<=", 0.1)
    assert cosine.expression == "cosine>=0.98"
    for bad in (True, None, [1]):
        with pytest.raises(UsageError, match="cannot read a gate"):
            parse_gates({"cosine": bad})  # type: ignore[dict-item]  # that is the point


def test_percent_and_none() -> None:
    assert parse_gates("top1_agreement>=98%")[0].threshold == pytest.approx(0.98)
    assert parse_gates(None) == ()
    assert evaluate_gates(samples.report(), None) == []


def test_values_come_from_the_report() -> None:
    report = samples.report()
    gates = {
        "cosine": ">=0.99",
        "cosine_min": ">=0.97",
        "relative_error": "<=0.1",
        "top1_agreement": ">=0.98",
        "kl": "<=0.02",
        "accuracy": ">=0.8",
        "accuracy_drop": "<=0.01",
        "max_abs_diff": "<=1e-4",
        "speedup": ">=1.2",
        "latency_ms": "<=60",
        "ideal_speedup": ">=1",
        "memory_ratio": "<=1",
    }
    results = {found.metric: found for found in evaluate_gates(report, gates)}
    assert [name for name, found in results.items() if not found.passed] == ["cosine_min", "latency_ms"]
    assert results["accuracy_drop"].value == pytest.approx(0.0036)
    assert results["latency_ms"].value == pytest.approx(108.8 / 1.61)
    assert results["speedup"].kind == "speed"
    assert results["cosine"].kind == "accuracy"
    assert samples.report(gates=list(results.values())).state == "accuracy_gate_missed"


def test_the_worst_output_counts_unless_one_is_named() -> None:
    fidelity = samples.fidelity().model_copy(
        update={
            "outputs": (
                OutputFidelity(output="logits", samples=4, cosine_mean=0.9, kl=0.5),
                OutputFidelity(output="present.0.key", samples=4, cosine_mean=0.99, kl=0.1),
            )
        }
    )
    report = samples.report(fidelity=fidelity)
    values = [found.value for found in evaluate_gates(report, ["cosine>=0", "kl<=9", "present.0.key.cosine>=0"])]
    assert values == [0.9, 0.5, 0.99]
    with pytest.raises(UsageError, match="no output nothing"):
        evaluate_gates(report, "nothing.cosine>=0")


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        ("cosine>=0", "--calib"),
        ("accuracy>=0", "labels"),
        ("speedup>=0", "calibration is off"),
        ("memory_ratio<=9", "Linux"),
    ],
)
def test_what_was_not_measured_fails_with_a_reason(gate: str, reason: str) -> None:
    bare = samples.report(fidelity=None, latency=None, memory=None)
    (found,) = evaluate_gates(bare, gate)
    assert not found.passed
    assert found.value is None
    assert reason in found.reason


def test_nan_fails_every_accuracy_gate_but_no_speed_gate() -> None:
    broken = OutputFidelity(output="logits", samples=3, cosine_mean=0.999, nonfinite_samples=1)
    report = samples.report(fidelity=samples.fidelity().model_copy(update={"outputs": (broken,)}))
    accuracy, speed = evaluate_gates(report, ["cosine>=0.5", "speedup>=1"])
    assert (accuracy.passed, speed.passed) == (False, True)
    assert "1 samples gave NaN" in accuracy.reason


def test_parsed_gates_can_be_evaluated_later() -> None:
    gates = parse_gates(["speedup>=1.2", "speedup>=9"])
    results = evaluate_gates(samples.report(), gates)
    assert [found.passed for found in results] == [True, False]
    assert Report.parse(samples.report(gates=results).to_json()).state == "speed_gate_missed"
