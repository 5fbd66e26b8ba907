from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokcc.errors import UsageError
from tokcc.report.distances import cosine_rows, kl_rows, log_softmax, relative_error_rows
from tokcc.report.fidelity import FidelityMeter
from tokcc.report.schema import Fidelity, OutputFidelity

Array = np.ndarray


def slow_cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)))


def slow_softmax(row: list[float]) -> list[float]:
    peak = max(row)
    raised = [math.exp(x - peak) for x in row]
    return [x / sum(raised) for x in raised]


def slow_kl(a: list[float], b: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(slow_softmax(a), slow_softmax(b), strict=True))


def compare(a: Array, b: Array, name: str = "logits", **options: object) -> OutputFidelity:
    return result({name: a}, {name: b}, **options).outputs[0]


def result(a: dict[str, Array], b: dict[str, Array], **options: object) -> Fidelity:
    meter = FidelityMeter()
    meter.update(a, b, **options)  # type: ignore[arg-type]  # options of several types
    return meter.result(source="test")


@pytest.fixture
def pair() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(17, 6)).astype(np.float32)
    return a, (a + rng.normal(scale=0.4, size=a.shape)).astype(np.float32)


def test_numbers_agree_with_plain_python(pair: tuple[Array, Array]) -> None:
    rows = [(a.tolist(), b.tolist()) for a, b in zip(*pair, strict=True)]
    cosines = [slow_cosine(a, b) for a, b in rows]
    errors = [
        math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True))) / math.sqrt(sum(x * x for x in a))
        for a, b in rows
    ]
    found = compare(*pair)
    assert found.samples == 17
    assert found.cosine_mean == pytest.approx(sum(cosines) / 17)
    assert found.cosine_min == pytest.approx(min(cosines))
    assert found.relative_error_mean == pytest.approx(sum(errors) / 17)
    assert found.relative_error_max == pytest.approx(max(errors))
    assert found.top1_agreement == sum(a.index(max(a)) == b.index(max(b)) for a, b in rows) / 17
    assert found.kl == pytest.approx(sum(slow_kl(a, b) for a, b in rows) / 17)


@given(st.data())
def test_batches_do_not_matter(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    a, b = (data.draw(hnp.arrays(np.float32, (count, 4), elements=st.floats(-50, 50, width=32))) for _ in range(2))
    cut = data.draw(st.integers(0, count))
    meter = FidelityMeter()
    for part in (slice(0, cut), slice(cut, count)):
        meter.update({"logits": a[part]}, {"logits": b[part]}, labels=[0] * len(a[part]))
    whole = result({"logits": a}, {"logits": b}, labels=[0] * count)
    split = meter.result(source="test")
    assert split.samples == whole.samples == count
    assert split.metrics == whole.metrics
    for name, value in whole.outputs[0].model_dump().items():
        assert getattr(split.outputs[0], name) == (value if isinstance(value, str | None) else pytest.approx(value))


@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_an_array_is_equal_to_itself(values: Array) -> None:
    found = compare(values, values)
    assert found.cosine_min == pytest.approx(1)
    assert (found.relative_error_max, found.top1_agreement, found.kl) == (0, 1, 0)


@given(
    hnp.arrays(np.float64, (4, 6), elements=st.floats(-30, 30)),
    hnp.arrays(np.float64, (4, 6), elements=st.floats(-30, 30)),
)
def test_bounds(a: Array, b: Array) -> None:
    assert (np.abs(cosine_rows(a, b)) <= 1).all()
    assert (kl_rows(a, b) >= 0).all()
    assert np.allclose(np.exp(log_softmax(a)).sum(-1), 1)
    assert np.allclose(kl_rows(a, a + 3.0), 0, atol=1e-9)  # softmax ignores a shift


def test_zero_rows() -> None:
    zero, one = np.zeros((1, 3)), np.ones((1, 3))
    assert cosine_rows(zero, zero)[0] == 1
    assert cosine_rows(zero, one)[0] == 0
    assert relative_error_rows(zero, one)[0] == pytest.approx(math.sqrt(3))


def test_tiny_and_huge_rows_keep_their_direction() -> None:
    a = np.array([[1e-200, 1e-200], [1e150, 0.0]])
    assert cosine_rows(a, a) == pytest.approx([1, 1])


def test_embeddings_have_no_top1_and_token_logits_have_one() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    assert compare(values, values, "last_hidden_state").top1_agreement is None
    assert compare(values[:, 0], values[:, 0], "pooler_output").top1_agreement is None
    assert compare(values[:, 0], values[:, 0], "linear_1").top1_agreement == 1
    assert compare(values, values, "logits").top1_agreement == 1
    meter = FidelityMeter(logits=["pooler_output"])
    meter.update({"pooler_output": values[:, 0]}, {"pooler_output": values[:, 0]})
    assert meter.result(source="test").outputs[0].top1_agreement == 1


def test_probabilities_are_compared_as_they_are() -> None:
    p, q = np.array([[0.7, 0.2, 0.1, 0.0]]), np.array([[0.6, 0.3, 0.1, 0.0]])
    expected = 0.7 * math.log(0.7 / 0.6) + 0.2 * math.log(0.2 / 0.3)
    assert compare(p, q, "probabilities").kl == pytest.approx(expected)


def test_accuracy_before_and_after() -> None:
    a = np.eye(4, dtype=np.float32)
    b = a.copy()
    b[0] = [0, 2, 0, 0]
    (metric,) = result({"logits": a}, {"logits": b}, labels=[0, 1, 2, 0]).metrics
    assert (metric.name, metric.before, metric.after, metric.samples) == ("accuracy", 0.75, 0.5, 4)


@pytest.mark.parametrize(
    ("labels", "message"), [([0], "do not fit the batch"), ([0, 9], "not a class"), ([0, -1], "not a")]
)
def test_wrong_labels_are_refused(labels: list[int], message: str) -> None:
    values = np.zeros((2, 3), dtype=np.float32)
    with pytest.raises(UsageError, match=message):
        result({"logits": values}, {"logits": values}, labels=labels)


def test_perplexity_agrees_with_plain_python_and_ignores_padding() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=(2, 6, 7)).astype(np.float32) for _ in range(2))
    tokens = rng.integers(0, 7, size=(2, 6))
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    (metric,) = result({"logits": a}, {"logits": b}, tokens=tokens, mask=mask).metrics
    expected = []
    for values in (a, b):
        terms = [
            -math.log(slow_softmax(values[row, i].tolist())[tokens[row, i + 1]])
            for row, length in ((0, 6), (1, 4))
            for i in range(length - 1)
        ]
        expected.append(math.exp(sum(terms) / len(terms)))
    assert (metric.name, metric.samples, metric.higher_is_better) == ("perplexity", 8, False)
    assert (metric.before, metric.after) == (pytest.approx(expected[0]), pytest.approx(expected[1]))


def test_padding_is_left_out_of_every_number() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(size=(2, 5, 3)).astype(np.float32)
    b = a.copy()
    b[1, 3:] = 1e6
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert compare(a, b, mask=mask).cosine_min == pytest.approx(1)
    assert compare(a, b).cosine_min != pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_only_the_engine_gets_wrong_is_counted(pair: tuple[Array, Array], bad: float) -> None:
    a, b = pair
    broken = b.copy()
    broken[3, 2] = bad
    meter = FidelityMeter()
    meter.update({"logits": a}, {"logits": broken})
    found = meter.result(source="test").outputs[0]
    assert (found.samples, found.nonfinite_samples, meter.nonfinite_samples) == (16, 1, 1)
    rest = compare(np.delete(a, 3, axis=0), np.delete(b, 3, axis=0))
    assert found.cosine_mean == pytest.approx(rest.cosine_mean)
    assert found.kl == pytest.approx(rest.kl)


def test_masked_logits_of_the_baseline_are_no_fault_of_the_engine(pair: tuple[Array, Array]) -> None:
    a, b = (np.concatenate([values, np.full((17, 1), -np.inf, dtype=np.float32)], axis=1) for values in pair)
    found, plain = compare(a, b), compare(*pair)
    assert found.nonfinite_samples == 0
    assert found.cosine_mean == pytest.approx(plain.cosine_mean)
    assert found.kl == pytest.approx(plain.kl)


def test_an_engine_that_only_gives_nan_has_no_numbers() -> None:
    values = np.ones((2, 3), dtype=np.float32)
    found = compare(values, values * np.nan)
    assert (found.samples, found.nonfinite_samples, found.cosine_mean, found.top1_agreement) == (0, 2, None, None)


def test_integer_outputs_are_compared_by_equality() -> None:
    found = compare(np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 5]]), "ids")
    assert found.exact_match == 0.75
    assert found.cosine_mean is None


def test_reduced_outputs_are_aligned_through_their_index() -> None:
    a = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    index = np.array([[0, 2, 5], [0, 1, 4]])
    kept = np.stack([a[row, index[row]] for row in range(2)])
    found = result({"y": a}, {"y": kept, "y.token_index": index})
    assert found.outputs[0].cosine_min == pytest.approx(1)
    assign = np.array([[0, 0, 1, 1, 2, 2]] * 2)
    merged = a[:, [0, 2, 4]]
    spread = merged[:, [0, 0, 1, 1, 2, 2]]
    assert result({"y": spread}, {"y": merged, "y.token_assign": assign}).outputs[0].relative_error_max == 0


def test_contracts_choose_the_rows_of_the_baseline() -> None:
    a = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    meter = FidelityMeter(contracts={"*": "last_token", "x": {"rows": [0, 3]}})
    meter.update({"logits": a, "x": a}, {"logits": a[:, -1:], "x": a[:, [0, 3]]})
    assert [found.relative_error_max for found in meter.result(source="test").outputs] == [0, 0]


def test_outputs_that_cannot_be_compared_say_why() -> None:
    a = np.zeros((2, 6, 3), dtype=np.float32)
    found = result({"y": a}, {"y": a[:, :4]})
    assert found.outputs == ()
    assert "shapes differ" in found.skipped["y"]
    with pytest.raises(UsageError, match="no output y"):
        result({"y": a}, {"z": a})


def test_half_precision_and_one_dimensional_outputs() -> None:
    a = np.array([1.0, -2.0, 3.0], dtype=np.float16)
    found = compare(a, a, "score")
    assert (found.samples, found.relative_error_max, found.top1_agreement) == (3, 0, None)
