"""AS-ViT against a brute-force reading of arXiv:2209.13802."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch.export import Dim

from tests.passes.oracle import Cut, Feeds, Method, Model, Result, Scene, compare, drop, reference
from tests.passes.reference_models import patches, sentences, text, vision
from tokcc.config import load_policy
from tokcc.passes.methods import library

LAYERS = (0, 1, 2)


def importance(scene: Scene) -> list[float]:
    """Equations 5 and 6: the class token's attention, heads weighted by the norm of what they give to the token."""
    heads = range(len(scene.probs))
    attended = scene.probs @ scene.values  # [H, N, D]
    score = []
    for j in range(scene.n):
        norms = [float(attended[h, j].norm()) for h in heads]
        shares = [norm / (sum(norms) + 1e-8) for norm in norms]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        score.append(sum(float(scene.probs[h, 0, j]) * shares[h] for h in heads))
    return score


def as_vit(thresholds: Sequence[float], slots: int) -> Method:
    def method(scene: Scene) -> Cut | None:
        score = importance(scene)
        passing = [j for j in range(1, scene.n) if score[j] > thresholds[LAYERS.index(scene.layer)]]
        best = sorted(passing, key=lambda j: (-score[j], j))[:slots]
        return drop(scene, [0, *sorted(best)])

    return method


def check(model: Model, feeds: Feeds, thresholds: Sequence[float], slots: int, **kwargs: Any) -> list[Result]:
    at = {"layers": list(LAYERS)}
    step = {"preset": "as-vit", "thresholds": list(thresholds), "at": at, "budget": {"tokens": slots}}

    def oracle(sample: Feeds) -> Result:
        return reference(model, sample, as_vit(thresholds, slots), layers=LAYERS, at_end=True)

    return compare(model, feeds, step, oracle, **kwargs)


def test_images_keep_different_numbers() -> None:
    results = check(vision(), {"patches": patches(4, 40)}, [0.004, 0.008, 0.012], 39, full=True, engine=True)
    assert len({tuple(result.lengths) for result in results}) > 1
    assert all(2 < result.lengths[-1] < result.lengths[0] < 40 for result in results)


def test_slots_are_a_cap() -> None:
    results = check(vision(), {"patches": patches(3, 40)}, [0.004, 0.008, 0.012], 12)
    assert [result.lengths[0] for result in results] == [13] * 3


def test_a_threshold_that_nothing_fails_or_passes() -> None:
    assert check(vision(), {"patches": patches(2, 20)}, [-1.0, -1.0, -1.0], 19)[0].lengths == [20, 20, 20]
    assert check(vision(), {"patches": patches(2, 20)}, [2.0, 2.0, 2.0], 19)[0].lengths == [1, 1, 1]


def test_padded_rows_are_what_they_are_alone() -> None:
    check(text(), sentences([20, 14, 6]), [0.01, 0.02, 0.03], 18)


def test_dynamic_batch_and_resolution() -> None:
    shapes = {"patches": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=100)}}
    feeds = {"patches": patches(3, 38)}
    check(vision(), feeds, [0.004, 0.008, 0.012], 30, engine=True, dynamic=shapes, traced={"patches": patches(2, 26)})


def test_defaults() -> None:
    (step,) = load_policy("as-vit", presets=library()).policy.steps
    assert (step.at.resolve(12), step.at.resolve(16), step.at.resolve(20)) == ((3, 6, 9), (4, 8, 12), (5, 10, 15))
