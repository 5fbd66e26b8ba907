"""What counts as equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tokcc.backends.feeds import Feeds
from tokcc.backends.parity import (
    Check,
    Tolerance,
    check_parity,
    computed_in,
    defined_rows,
    numpy_feeds,
    oracle,
    refuse_difference,
)
from tokcc.errors import ParityError
from tokcc.testing import trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

Engine = Callable[[Mapping[str, Any]], dict[str, Any]]


def one(want: Tensor, got: Tensor, feeds: Feeds | None = None, tolerance: Tolerance | None = None) -> Check:
    (check,) = check_parity(lambda _: {"y": got.numpy()}, ["y"], [feeds or {}], [[want]], tolerance or Tolerance())
    return check


def test_equal_is_equal() -> None:
    x = torch.randn(3, 4)
    assert one(x, x) == Check("y", 0.0, float(x.abs().max()), 2e-4 * float(x.abs().max()), 0.0, passed=True)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_tolerance_is_a_share_of_the_scale(scale: float) -> None:
    want = torch.tensor([1.0, -0.5, 0.0]) * scale
    assert one(want, want + 1.5e-4 * scale).passed
    assert not one(want, want + 3e-4 * scale).passed


def test_the_scale_has_a_floor() -> None:
    assert one(torch.zeros(3), torch.full((3,), 1e-10)).passed
    assert not one(torch.zeros(3), torch.full((3,), 1e-8)).passed


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float16, 2e-2), (torch.float64, 2e-4)])
def test_the_tolerance_goes_by_dtype(dtype: torch.dtype, allowed: float) -> None:
    want = torch.ones(2, dtype=dtype)
    assert one(want, want + 0.8 * allowed).passed
    assert not one(want, want + 1.3 * allowed).passed


def test_tolerances_that_are_given() -> None:
    want = torch.tensor([100.0, 1.0])
    got = torch.tensor([101.0, 1.0])
    assert one(want, got, tolerance=Tolerance(atol=1.0)).passed
    assert not one(want, got, tolerance=Tolerance(atol=0.5)).passed
    assert one(want, got, tolerance=Tolerance(atol=0.0, rtol=0.011)).passed
    assert not one(want, got, tolerance=Tolerance(atol=0.0, rtol=0.009)).passed


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_whole_numbers_are_equal_or_not(dtype: torch.dtype) -> None:
    want = torch.tensor([1, 0, 1]).to(dtype)
    assert one(want, want).passed
    got = torch.tensor([1, 1, 1]).to(dtype)
    assert one(want, got, tolerance=Tolerance(atol=5.0)).passed is False


def test_of_the_codes_in_a_cache_a_few_may_differ() -> None:
    want = torch.arange(200, dtype=torch.uint8)
    for count, passed in ((4, True), (5, False)):
        got = want.clone()
        got[:count] += 16
        (check,) = check_parity(
            lambda _, got=got: {"present.0.key": got.numpy()},  # type: ignore[misc]
            ["present.0.key"],
            [{}],
            [[want]],
            Tolerance(),
        )
        assert (check.passed, check.max_abs_diff) == (passed, count / 200)
        assert not one(want, got).passed


def test_shapes_must_agree() -> None:
    check = one(torch.zeros(2, 3), torch.zeros(3, 2))
    assert not check.passed
    assert math.isinf(check.max_abs_diff)
    assert not one(torch.zeros(0, 3), torch.zeros(3, 0)).passed


def test_empty_outputs_are_equal() -> None:
    assert one(torch.zeros(0, 3), torch.zeros(0, 3)).passed


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none(bad: float) -> None:
    want = torch.tensor([1.0, 2.0])
    assert not one(want, torch.tensor([1.0, bad])).passed
    assert not one(torch.tensor([1.0, bad]), want).passed
    assert one(torch.tensor([1.0, bad]), torch.tensor([1.0, bad])).passed


def test_an_infinite_reference_hides_no_difference() -> None:
    """The scale is that of the numbers, not of a masked logit."""
    want = torch.tensor([float("-inf"), 1.0, 2.0])
    assert not one(want, torch.tensor([float("-inf"), 1.5, 2.0])).passed
    assert not one(want, torch.tensor([float("inf"), 1.0, 2.0])).passed
    assert one(want, torch.tensor([float("-inf"), 1.0001, 2.0])).scale == 2.0


def test_rows_of_padding_are_not_compared() -> None:
    want = torch.randn(2, 3, 4)
    got = want.clone()
    got[1, 2] += 5
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert one(want, got, {"attention_mask": mask}).passed
    assert one(want, got, {"src_key_padding_mask": mask == 0}).passed
    assert not one(want, got, {"other": mask}).passed
    got[1, 1] += 5
    assert not one(want, got, {"attention_mask": mask}).passed


def test_only_token_level_outputs_have_such_rows() -> None:
    mask = torch.ones(2, 3, dtype=torch.int64)
    assert defined_rows(torch.zeros(2, 3), {"attention_mask": mask}) is None
    assert defined_rows(torch.zeros(2, 5, 4), {"attention_mask": mask}) is None
    rows = defined_rows(torch.zeros(2, 3, 4), {"attention_mask": mask})
    assert rows is not None
    assert rows.all()


def test_the_worst_of_several_inputs_is_reported() -> None:
    """A failure on one input is reported even where another has the greater difference, or none can be given."""
    wants = [torch.tensor([100.0]), torch.tensor([1.0]), torch.tensor([float("nan")])]
    gots = [torch.tensor([100.01]), torch.tensor([1.001]), torch.tensor([float("nan")])]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        answers = iter([gots[i] for i in order])
        (check,) = check_parity(
            lambda _, it=answers: {"y": next(it).numpy()},  # type: ignore[misc]  # a bound default
            ["y"],
            [{}, {}, {}],
            [[wants[i]] for i in order],
            Tolerance(),
        )
        assert not check.passed
        assert check.scale == 1.0


def test_every_output_is_checked() -> None:
    a, b = torch.ones(2), torch.zeros(3)
    checks = check_parity(lambda _: {"b": b.numpy(), "a": a.numpy() + 1}, ["a", "b"], [{}], [[a, b]], Tolerance())
    assert [(c.output, c.passed) for c in checks] == [("a", False), ("b", True)]


def test_a_missing_output_is_an_error() -> None:
    with pytest.raises(KeyError):
        check_parity(lambda _: {}, ["y"], [{}], [[torch.ones(1)]], Tolerance())


def test_refusal_names_the_output_and_the_difference() -> None:
    checks = [one(torch.ones(2), torch.ones(2)), one(torch.ones(2), torch.full((2,), 1.5))]
    with pytest.raises(ParityError) as caught:
        refuse_difference("onnx", checks)
    assert caught.value.node == "output `y`"
    assert caught.value.found == "0.5"
    assert caught.value.help
    refuse_difference("onnx", checks[:1])


def test_feeds_for_a_runtime() -> None:
    feeds = numpy_feeds({"x": torch.ones(2, requires_grad=True), "mask": torch.tensor([True])})
    assert isinstance(feeds["x"], np.ndarray)
    assert feeds["mask"].dtype == np.bool_


class Mixed(nn.Module):
    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> dict[str, Any]:
        return {"sum": x + pair[0], "rest": [pair[1] * 2, None], "count": 3}


def test_the_oracle_runs_by_name_and_gives_the_tensors() -> None:
    x, y, z = torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 5.0)
    program = trace(Mixed(), {"x": x, "pair": (y, z)})  # type: ignore[dict-item]  # inputs may be nested
    run = oracle(program)
    first, second = run({"x": x, "pair.0": y, "pair.1": z})
    assert torch.equal(first, x + y)
    assert torch.equal(second, z * 2)


@pytest.mark.parametrize(("made_in", "share"), [(torch.float32, 2e-4), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_a_sum_is_as_exact_as_what_it_is_made_of(made_in: torch.dtype, share: float) -> None:
    """H2O adds attention weights of half precision up in float32."""
    want = torch.tensor([[20.0, 5.0]])
    for off, passed in ((0.9 * share, True), (1.1 * share, False)):
        got = want + 20 * off
        run = {"present.0.key_score": got.numpy()}
        (check,) = check_parity(lambda _, run=run: run, list(run), [{}], [[want]], Tolerance(), made_in=made_in)
        assert check.passed is passed
        assert check.atol == pytest.approx(20 * share)


def test_what_a_program_computes_in() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.register_buffer("places", torch.arange(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)[:, self.places]

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = Norm().to(dtype)
        assert computed_in(trace(model, {"x": torch.randn(2, 4, dtype=dtype)})) == dtype
    assert computed_in(trace(nn.ReLU(), {"input": torch.randn(2, 4)})) == torch.float32
