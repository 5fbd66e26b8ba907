"""Choices that fall otherwise: explained by rounding, followed, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tokcc import kernels
from tokcc.backends.decisions import decisions, replay, watching
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.backends.ort import Session
from tokcc.backends.parity import Tolerance
from tokcc.ir.program import Program
from tokcc.pipeline.settling import Settled, settle
from tokcc.testing import trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")

ROUNDING = 1e-6
WRONG = 1e-2


class Chooses(nn.Module):
    """Rates tokens, chooses some, returns what was chosen of a payload that tells them apart."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.choose = choose

    def forward(self, score: Tensor, payload: Tensor) -> Tensor:
        return self.choose(score * 1.0).to(torch.float32) * 1000.0 + payload


def argmax(score: Tensor) -> Tensor:
    return score.argmax(1, keepdim=True)


def lowest(score: Tensor) -> Tensor:
    return score.min(1, keepdim=True)[1]


def best_four(score: Tensor) -> Tensor:
    return score.topk(4, dim=1)[1]


def best_values(score: Tensor) -> Tensor:
    value, index = score.topk(4, dim=1)
    return value + index


def order(score: Tensor) -> Tensor:
    return score.sort(dim=1, descending=True)[1]


def above(score: Tensor) -> Tensor:
    return (score > 0.5).to(torch.float32)


def selected(score: Tensor) -> Tensor:
    return kernels.topk_select(score, 4, True)


def spread(score: Tensor) -> Tensor:
    apart = -(score[:, :, None] - score[:, None, :]).abs()
    return kernels.greedy_select(apart, torch.zeros_like(score), score, 4)


def covering(score: Tensor) -> Tensor:
    table = (score[:, None, :] * torch.ones(1, 2, 1)).clamp_min(0.0)
    return kernels.cover_select(table, torch.zeros_like(score), 1)


def determinant(score: Tensor) -> Tensor:
    return kernels.dpp_select(score[:, :, None] * torch.eye(7), torch.zeros_like(score), 4)


# Of the scores below: the two tokens of sample 0 that are nearly equal, and what they are nearly equal to.
BEST, WORST, MIDDLE = (0, 2, 0.8), (1, 3, 0.1), (5, 6, 0.5)
CHOICES = {
    argmax: BEST,
    lowest: WORST,
    best_four: MIDDLE,
    best_values: MIDDLE,
    order: BEST,
    above: MIDDLE,
    selected: MIDDLE,
    spread: WORST,
    covering: BEST,
    determinant: MIDDLE,
}


def traced(choose: Callable[[Tensor], Tensor]) -> tuple[Program, Tensor]:
    """Return the program, and scores whose best, lowest, fourth best and threshold are clear."""
    score = torch.tensor([[0.9, 0.1, 0.8, 0.3, 0.7, 0.55, 0.4], [0.2, 0.95, 0.6, 0.75, 0.05, 0.85, 0.35]])
    width = choose(score).shape[1]
    return trace(Chooses(choose), {"score": score, "payload": torch.randn(2, width)}), score


def moved(score: Tensor, pair: tuple[int, int, float], gap: float) -> tuple[Tensor, Tensor]:
    """Return two sets of scores, ``gap`` apart, in which two tokens of sample 0 stand in either order."""
    one, two, level = pair
    near, other = score.clone(), score.clone()
    near[0, one], near[0, two] = level + gap / 2, level - gap / 2
    other[0, one], other[0, two] = level - gap / 2, level + gap / 2
    return near, other


def shown(program: Program, feeds: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    watched = decisions(program)
    path = folder / "watched.onnx"
    save_onnx(build_onnx(watching(program, watched)), path)
    got = Session(path, threads=1).run({name: value.numpy() for name, value in feeds.items()})
    return {name: torch.from_numpy(np.array(value)) for name, value in got.items()}


@pytest.mark.parametrize("choose", CHOICES, ids=lambda f: f.__name__)
def test_what_rounding_decides_is_followed(choose: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    """An engine that saw numbers a rounding apart chose otherwise: the reference agrees, given its choice."""
    program, score = traced(choose)
    near, other = moved(score, CHOICES[choose], ROUNDING)
    payload = torch.randn(2, choose(score).shape[1])
    assert not torch.equal(choose(near), choose(other))
    chosen = shown(program, {"score": other, "payload": payload}, tmp_path)
    found = replay(program, decisions(program), {"score": near, "payload": payload}, chosen)
    assert found.refused is None
    assert 0 < found.differing <= found.elements
    (output,) = found.outputs
    torch.testing.assert_close(output, chosen["output"], rtol=0, atol=1e-2)
    assert (output - Chooses(choose)(near, payload)).abs().max() > 0.9 * (1 if choose is best_values else 1000)


@pytest.mark.parametrize("choose", CHOICES, ids=lambda f: f.__name__)
def test_what_rounding_does_not_explain_is_refused(choose: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    program, score = traced(choose)
    near, other = moved(score, CHOICES[choose], WRONG)
    payload = torch.randn(2, choose(score).shape[1])
    chosen = shown(program, {"score": other, "payload": payload}, tmp_path)
    found = replay(program, decisions(program), {"score": near, "payload": payload}, chosen)
    assert found.refused is not None
    assert "worse than the best" in found.refused


def test_equal_choices_change_nothing(tmp_path: Path) -> None:
    program, score = traced(order)
    feeds = {"score": score, "payload": torch.randn(2, 7)}
    found = replay(program, decisions(program), feeds, shown(program, feeds, tmp_path))
    assert (found.differing, found.refused) == (0, None)
    assert found.elements == score.numel()
    assert torch.equal(found.outputs[0], Chooses(order)(**feeds))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (torch.tensor([[0, 2, 4, 4], [1, 5, 3, 2]]), "inf"),  # one twice
        (torch.tensor([[0, 2, 4, 7], [1, 5, 3, 2]]), "inf"),  # one that is none
        (torch.tensor([[0, 2, 4, -1], [1, 5, 3, 2]]), "inf"),
        (torch.tensor([[0, 2, 4], [1, 5, 3]]), "shape"),
    ],
)
def test_what_is_no_choice(wrong: Tensor, why: str) -> None:
    program, score = traced(best_four)
    watched = decisions(program)
    feeds = {"score": score, "payload": torch.zeros(2, 4)}
    found = replay(program, watched, feeds, {watched[0].output: wrong})
    assert found.refused is not None
    assert why in found.refused


def test_among_equals_any_is_right() -> None:
    program, score = traced(best_four)
    watched = decisions(program)
    other = torch.tensor([[2, 0, 5, 4], [5, 1, 2, 3]])
    feeds = {"score": torch.ones_like(score), "payload": torch.zeros(2, 4)}
    assert replay(program, watched, feeds, {watched[0].output: other}).refused is None


def test_one_sample_says_nothing_of_the_scale_of_another() -> None:
    program, score = traced(best_four)
    watched = decisions(program)
    score[0], score[1] = score[0] * 1000, score[1] * 0.01
    wrong = best_four(score)
    wrong[1] = score[1].argsort()[:4]
    found = replay(program, watched, {"score": score, "payload": torch.zeros(2, 4)}, {watched[0].output: wrong})
    assert found.refused is not None


def test_kept_tokens_in_another_order_are_refused() -> None:
    program, score = traced(selected)
    watched = decisions(program)
    assert selected(score)[0].tolist() == [0, 2, 4, 5]
    wrong = torch.tensor([[4, 2, 0, 5], [1, 2, 3, 5]])
    found = replay(program, watched, {"score": score, "payload": torch.zeros(2, 4)}, {watched[0].output: wrong})
    assert found.refused is not None
    assert "inf" in found.refused


def test_a_bad_token_at_an_unchanged_rank_is_refused() -> None:
    """Only the first index differs, and the token it stands for is last by score."""
    program, score = traced(selected)
    watched = decisions(program)
    score[0] = torch.tensor([0.1, 0.5, 0.7, 0.8, 0.9, 0.2, 0.3])
    feeds = {"score": score, "payload": torch.zeros(2, 4)}
    wrong = selected(score)
    assert wrong[0].tolist() == [1, 2, 3, 4]
    wrong[0, 0] = 0
    found = replay(program, watched, feeds, {watched[0].output: wrong})
    assert found.refused is not None
    assert "0.4 worse than the best" in found.refused


def test_choices_of_whole_numbers_are_none() -> None:
    program = trace(nn.Linear(2, 2), {"input": torch.ones(1, 2)})
    assert decisions(program) == []

    class Equal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.long() > 1

    assert decisions(trace(Equal(), {"x": torch.ones(2)})) == []


def build(program: Program, path: Path) -> None:
    save_onnx(build_onnx(program), path)


def engine_of(program: Program, folder: Path) -> Path:
    path = folder / "model.onnx"
    build(program, path)
    return path


def test_settling_an_engine(tmp_path: Path) -> None:
    """The engine was made from a program that rounds otherwise: something is added to one score."""
    program, score = traced(argmax)
    near, _ = moved(score, BEST, ROUNDING)

    class Rounds(Chooses):
        def __init__(self, token: int, by: float) -> None:
            super().__init__(argmax)
            self.more = [by if i == token else 0.0 for i in range(7)]

        def forward(self, score: Tensor, payload: Tensor) -> Tensor:
            return super().forward(score + torch.tensor(self.more), payload)

    def settled(token: int, by: float) -> Settled | str:
        feeds = {"score": near, "payload": torch.zeros(2, 1)}
        engine = engine_of(trace(Rounds(token, by), feeds), tmp_path)
        return settle(program, trace(Rounds(token, by), feeds), engine, ["output"], [feeds], build, Tolerance())

    found = settled(2, 2 * ROUNDING)
    assert isinstance(found, Settled), found
    assert all(check.passed for check in found.checks)
    assert "1 of 2 choices" in found.note
    refused = settled(4, 0.2)
    assert isinstance(refused, str)
    assert "worse than the best" in refused
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_model_without_choices_has_nothing_to_settle(tmp_path: Path) -> None:
    program = trace(nn.Linear(3, 3), {"input": torch.randn(1, 3)})
    feeds: dict[str, Any] = {"input": torch.randn(1, 3)}
    found = settle(program, program, engine_of(program, tmp_path), ["output"], [feeds], build, Tolerance())
    assert found == "the model makes no choices"


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 2e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_numbers_are_as_exact_as_what_they_are_made_of(dtype: torch.dtype, near: float) -> None:
    """Similarities are computed in float32, of keys in half precision."""

    class Similar(nn.Module):
        def forward(self, keys: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            score = (keys * keys).float().sum(2)
            return score.topk(2, 1).indices, other.topk(2, 1).indices

    program = trace(Similar(), {"keys": torch.randn(2, 7, 4).to(dtype), "other": torch.randn(2, 7)})
    made, plain = decisions(program)
    assert (made.near, plain.near) == (near, 2e-5)
