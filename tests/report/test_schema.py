from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from tests.report import samples
from tokcc.errors import OutputError, UsageError
from tokcc.report import parts
from tokcc.report.schema import (
    GateResult,
    KeptText,
    OutputFidelity,
    Parity,
    ParityCheck,
    Report,
    Spread,
    Totals,
    json_schema,
    write_json_schema,
)


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    report = samples.report()
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_saving_replaces_the_previous_file(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    samples.report().save(target)
    assert Report.load(target).model.source == "vit-small"


def test_saving_into_a_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write report\.json"):
        samples.report().save(tmp_path / "no" / "report.json")


def test_symbolic_token_counts_stay_strings_and_ints_stay_ints() -> None:
    row = samples.rows()[0].model_copy(update={"tokens_in": "s0", "tokens_out": "s0 - 13"})
    again = Report.parse(samples.report(layers=(row,)).to_json())
    assert (again.layers[0].tokens_in, again.layers[0].tokens_out) == ("s0", "s0 - 13")
    assert Report.parse(samples.report().to_json()).layers[0].tokens_in == 197


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a report"),
        ("{}", "another schema version"),
        ('{"schema_version": 99}', "another schema version"),
        ('{"schema_version": 1}', "is not a valid report"),
    ],
)
def test_a_damaged_report_is_refused_with_a_reason(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        Report.load(path)
    assert caught.value.help


def test_a_missing_or_binary_report_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the report"):
        Report.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot read the report"):
        Report.load(tmp_path / "binary.json")


def test_an_unknown_key_is_refused_and_named() -> None:
    raw = json.loads(samples.report().to_json())
    raw["totals"]["speed"] = 3
    with pytest.raises(UsageError, match=r"totals\.speed"):
        Report.parse(json.dumps(raw))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_cannot_hold_are_refused(value: float) -> None:
    with pytest.raises(ValidationError):
        OutputFidelity(output="logits", samples=1, cosine_mean=value)


def test_no_number_without_a_parity_pass() -> None:
    failed = Parity(passed=False, batches=1)
    with pytest.raises(ValidationError, match="parity did not pass"):
        samples.report(parity=failed)
    bare = samples.report(parity=failed, fidelity=None, latency=None, memory=None)
    assert bare.latency is None


def test_parity_cannot_pass_with_a_failed_check() -> None:
    check = ParityCheck(engine="onnx", output="y", max_abs_diff=1, scale=1, atol=0, rtol=0, passed=False)
    with pytest.raises(ValidationError, match="a check failed"):
        Parity(passed=True, batches=1, checks=(check,))
    assert Parity(passed=False, batches=1, checks=(check,)).max_abs_diff == 1
    assert Parity(passed=True, batches=1).max_abs_diff is None


@given(before=st.integers(0, 10**15), after=st.integers(0, 10**15), speedup=st.floats(0.01, 100))
def test_totals_fill_only_what_the_numbers_allow(before: int, after: int, speedup: float) -> None:
    totals = Totals.of(before, after, latency=samples.latency(speedup), inserted_seconds=1e-4)
    if before and after:
        assert totals.ideal_speedup == before / after
        assert totals.realised_over_ideal == pytest.approx(speedup / (before / after))
    else:
        assert totals.ideal_speedup is None
        assert totals.realised_over_ideal is None
    assert totals.inserted_share == pytest.approx(min(1.0, 1e-4 * speedup / 0.1088))
    assert Totals.of(before, after).realised_speedup is None


@pytest.mark.parametrize(
    ("missed", "state"),
    [
        ((), "ok"),
        (("speed",), "speed_gate_missed"),
        (("accuracy",), "accuracy_gate_missed"),
        (("speed", "accuracy"), "accuracy_gate_missed"),
    ],
)
def test_state_follows_the_gates(missed: tuple[str, ...], state: str) -> None:
    gates = [
        GateResult(expression="e", metric="m", kind=kind, threshold=1, value=None, passed=kind not in missed)
        for kind in ("accuracy", "speed")
    ]
    assert samples.report(gates=gates).state == state


def test_texts_must_be_aligned() -> None:
    with pytest.raises(ValidationError, match="2 tokens but 1 entries"):
        KeptText(tokens=("a", "b"), gone_after=(None,))


def test_models_are_frozen() -> None:
    spread = Spread(median=1, p10=1, p90=1)
    with pytest.raises(ValidationError):
        spread.median = 2  # type: ignore[misc]  # that is the point


def test_every_field_of_every_part_is_described() -> None:
    models = [value for value in vars(parts).values() if isinstance(value, type) and issubclass(value, parts.Part)]
    for model in [*models, Report]:
        assert model.__doc__
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"


def test_json_schema_accepts_what_is_written(tmp_path: Path) -> None:
    write_json_schema(tmp_path / "schema.json")
    schema = json.loads((tmp_path / "schema.json").read_text())
    assert schema == json_schema()
    assert schema["properties"]["schema_version"]["const"] == 1
    assert set(json.loads(samples.report().to_json())) == set(schema["properties"])
    assert issubclass(Report, BaseModel)
