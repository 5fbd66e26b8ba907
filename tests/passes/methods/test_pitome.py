"""PiToMe against a brute-force reading of arXiv:2405.16148 (energy-protected matching in every layer)."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.export import Dim

from tests.passes.oracle import (
    Cut,
    Feeds,
    Method,
    Model,
    Result,
    Scene,
    compare,
    cosine,
    merge,
    policy,
    reference,
    share_of,
)
from tests.passes.reference_models import audio, frames, patches, sentences, text, vision
from tokcc.testing import run_eager, trace


def pitome(ratio: float, protected: int, *, margin: float = 0.9, form: str = "elu") -> Method:
    def method(scene: Scene) -> Cut | None:
        key = {i: sum(scene.keys[h, i] for h in range(len(scene.keys))) for i in range(protected, scene.n)}
        m = margin * (1 - scene.layer / scene.depth)

        def rated(w: float) -> float:
            if w >= m:
                return w - m if form == "elu" else w
            return math.exp(w - m) - 1

        energy = {i: sum(rated(cosine(key[i], key[j])) for j in key) / len(key) for i in key}
        order = sorted(energy, key=lambda i: (-energy[i], i))
        r = min(len(key) - share_of(len(key), ratio), len(key) // 2)
        left, right = order[0 : 2 * r : 2], order[1 : 2 * r : 2]
        to = {a: max(right, key=lambda b: (cosine(key[a], key[b]), -right.index(b))) for a in left}
        return merge(scene, [*range(protected), *order[2 * r :], *right], list(to.items()))

    return method


def check(model: Model, feeds: Feeds, step: dict[str, Any], protected: int, **kwargs: Any) -> list[Result]:
    options = {"margin": step.get("margin", 0.9), "form": step.get("energy", "elu")}

    def oracle(sample: Feeds) -> Result:
        return reference(model, sample, pitome(step["ratio"], protected, **options), layers=range(len(model.blocks)))

    return compare(model, feeds, {"preset": "pitome", **step}, oracle, **kwargs)


@pytest.mark.parametrize("energy", ["elu", "paper"])
def test_images(energy: str) -> None:
    results = check(
        vision(), {"patches": patches(3, 50)}, {"ratio": 0.8, "margin": 0.5, "energy": energy}, 1, full=energy == "elu"
    )
    assert results[0].lengths == [41, 33, 27, 22]
    for result in results:
        for cut in result.cuts:
            assert cut.sizes is not None
            assert float(cut.sizes.sum()) == 50


def test_no_class_token_and_layers_without_a_merge() -> None:
    """At 9 tokens a ratio of 0.9 removes nothing: the matching is empty."""
    results = check(audio(), {"frames": frames(2, 11)}, {"ratio": 0.9}, 0)
    assert results[0].lengths == [10, 9, 9, 9]


@pytest.mark.parametrize("pooled", [True, False])
def test_padded_rows_are_what_they_are_alone(pooled: bool) -> None:
    check(text(pooled=pooled), sentences([20, 14, 9, 4]), {"ratio": 0.7, "margin": 0.6}, 1 if pooled else 0)


def test_dynamic_sequence() -> None:
    shapes = {"frames": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=60)}}
    for tokens in (23, 8):
        feeds = {"frames": frames(3, tokens)}
        check(audio(2), feeds, {"ratio": 0.8}, 0, dynamic=shapes, traced={"frames": frames(2, 16)})


@torch.no_grad()
def test_an_isolated_token_is_never_merged() -> None:
    """Clusters of near-copies and one token whose keys point away from all others."""
    model = copy.deepcopy(vision())
    model.positions.data.zero_()
    centres = patches(1, 4)[0]
    x = torch.cat([centres[0] + 0.05 * patches(1, 13, seed=1)[0], centres[1] + 0.05 * patches(1, 9, seed=2)[0]])
    x = torch.cat([x, -centres[:1] - centres[1:2]])[None]
    outlier = x.shape[1]  # behind the class token
    feeds = {"patches": x}
    _, plan = run_eager(trace(model, feeds), policy({"preset": "pitome", "ratio": 0.7}), feeds)
    position = outlier
    for space in plan.made[:2]:
        place = space.index[0].tolist().index(position)
        assert float(space.weight[0, place]) == 1
        position = place
    # The larger cluster has the larger energies: only its members merge first.
    merged = set(range(1, outlier + 1)) - set(plan.made[0].index[0].tolist())
    assert merged <= set(range(1, 13))
