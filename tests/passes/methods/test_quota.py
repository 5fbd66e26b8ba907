"""QuoTA (arXiv:2503.08689), the token pick, against the allocation written out frame by frame."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tests.passes.guided import choosing
from tests.passes.oracle import Feeds, Scene, compare, policy, program_of
from tests.passes.reference_models import audio, frames, patches, sentences, text, vision
from tokcc.errors import AxisError
from tokcc.testing import run_eager


def allocate(scores: list[float], size: int, total: int) -> list[int]:
    weights = [(100 * p) ** 2 + 1e-12 for p in scores]
    weights = [w / sum(weights) for w in weights]
    cap = size / total
    over = [max(w - cap, 0.0) for w in weights]
    under = sum(w for w in weights if w <= cap)
    wanted = [
        (cap if w > cap else w + sum(over) * w / under if under else w) * total for w in weights
    ]  # fmt: skip
    quota = [min(math.floor(w + 1e-5), size) for w in wanted]
    missing = total - sum(quota)
    by_rest = sorted(
        (f for f in range(len(quota)) if quota[f] < size), key=lambda f: (-(round(wanted[f] - quota[f], 4)), f)
    )
    for f in by_rest[:missing]:
        quota[f] += 1
    for f in sorted(range(len(quota)), key=lambda f: (-wanted[f], f)):
        more = min(size - quota[f], total - sum(quota))
        quota[f] += more
    return quota


def steps(size: int, count: int) -> list[int]:
    """Positions of ``linspace(0, size - 1, count)``, rounded halves up."""
    if count == 1:
        return [0]
    return [math.floor(Fraction(i * (size - 1), count - 1) + Fraction(1, 2)) for i in range(count)]


def quota(count: int, total: int) -> Callable[[Tensor, Scene, Feeds], list[int]]:
    def choose(z: Tensor, scene: Scene, sample: Feeds) -> list[int]:
        del scene
        size = len(z) // count
        own = allocate(sample["frame_scores"][0].tolist(), size, total)
        assert sum(own) == total
        return [f * size + place for f, k in enumerate(own) if k for place in steps(size, k)]

    return choose


def scores(*rows: list[float]) -> dict[str, Tensor]:
    return {"frame_scores": torch.tensor(rows)}


def test_frames() -> None:
    given = scores([0.9, 0.1, 0.5, 0.7], [0.2, 0.21, 0.83, 0.4], [0.99, 0.0, 0.03, 0.01])
    feeds = {"frames": frames(3, 36), **given}
    step = {"preset": "quota", "frames": 4, "keep": 0.5}
    compare(audio(), feeds, step, choosing(audio(), 0, quota(4, 18)), traced={"frames": frames(3, 36)}, engine=True)


def test_special_tokens_stay() -> None:
    feeds = {"patches": patches(2, 31), **scores([0.3, 0.8, 0.5], [0.9, 0.0, 0.0])}
    step = {"preset": "quota", "frames": 3, "budget": {"tokens": 7}}
    compare(vision(), feeds, step, choosing(vision(), 1, quota(3, 7)), traced={"patches": patches(2, 31)})


@pytest.mark.parametrize("value", [1.0, 0.25, 0.0])
def test_equal_scores_are_uniform(value: float) -> None:
    """Also all zeros: nothing divides by zero, and 16 tokens of 4 frames are 4 each."""
    feeds = {"frames": frames(1, 36), **scores([value] * 4)}
    step = {"preset": "quota", "frames": 4, "budget": {"tokens": 16}}
    _, plan = run_eager(program_of(audio(), {"frames": frames(1, 36)}), policy(step), feeds)
    assert plan.made[0].index[0].tolist() == [9 * f + place for f in range(4) for place in steps(9, 4)]


def test_one_frame_cannot_have_more_than_it_has() -> None:
    """The only frame that matters is full, and what is left goes to the others all the same."""
    feeds = {"frames": frames(1, 36), **scores([0.0, 0.0, 1.0, 0.0])}
    step = {"preset": "quota", "frames": 4, "budget": {"tokens": 16}}
    _, plan = run_eager(program_of(audio(), {"frames": frames(1, 36)}), policy(step), feeds)
    kept = plan.made[0].index[0].tolist()
    assert {*range(18, 27)} <= {*kept}
    assert len({*kept}) == 16


def test_frames_that_do_not_fit() -> None:
    for model, feeds in ((audio(), {"frames": frames(1, 35)}), (text(), sentences([20, 12]))):
        with pytest.raises(AxisError, match="4 frames"):
            run_eager(program_of(model, feeds), policy({"preset": "quota", "frames": 4}), feeds)
