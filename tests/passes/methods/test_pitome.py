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
    program_of,
    reference,
    share_of,
)
from tests.passes.reference_models import audio, frames, patches, sentences, text, vision
from tokcc.testing import reduce_program, run_eager, run_program, trace


def pitome(
    ratio: float,
    protected: int,
    *,
    margin: float = 0.9,
    form: str = "elu",
    still: bool = False,
    protect_from: float = 0.0,
) -> Method:
    """``still``: a layer that merges nothing keeps the order, as a whole reduction that removes nothing is left out."""

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
        if r == 0 and still:
            return Cut(list(range(scene.n)), scene.x, sizes=scene.sizes)
        if scene.layer < math.ceil(protect_from * scene.depth):
            left, right = order[::2], order[1::2]
            best = {a: max(right, key=lambda b: (cosine(key[a], key[b]), -right.index(b))) for a in left if right}
            edges = sorted(best, key=lambda a: (-cosine(key[a], key[best[a]]), left.index(a)))
            return merge(scene, [*range(protected), *edges[r:], *right], [(a, best[a]) for a in edges[:r]])
        left, right = order[0 : 2 * r : 2], order[1 : 2 * r : 2]
        to = {a: max(right, key=lambda b: (cosine(key[a], key[b]), -right.index(b))) for a in left}
        return merge(scene, [*range(protected), *order[2 * r :], *right], list(to.items()))

    return method


def check(model: Model, feeds: Feeds, step: dict[str, Any], protected: int, **kwargs: Any) -> list[Result]:
    still = "mask" not in feeds and kwargs.get("dynamic") is None
    options = {"margin": step.get("margin", 0.9), "form": step.get("energy", "elu"), "still": still}
    options["protect_from"] = step.get("protect_from", 0.0)

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


def test_all_tokens_are_matched_in_the_first_layers() -> None:
    """As the reference implementation of classifiers does in the first half of the depth."""
    step = {"ratio": 0.8, "margin": 0.75, "protect_from": 0.5}
    assert check(vision(), {"patches": patches(3, 50)}, step, 1, full=True)[0].lengths == [41, 33, 27, 22]
    check(audio(), {"frames": frames(3, 30)}, {**step, "protect_from": 1.0}, 0, engine=True)
    check(text(), sentences([20, 13, 5]), step, 1)


def test_no_class_token_and_layers_without_a_merge() -> None:
    """At 9 tokens a ratio of 0.9 removes nothing: the matching is empty."""
    results = check(audio(), {"frames": frames(2, 11)}, {"ratio": 0.9}, 0)
    assert results[0].lengths == [10, 9, 9, 9]


@pytest.mark.parametrize(("model", "protected"), [(vision, 1), (audio, 0)])
@pytest.mark.parametrize("candidates", [0, 1])
def test_fewer_than_two_candidates(model: Any, protected: int, candidates: int) -> None:
    """There is no pair: nothing is removed, and the layer is as it was."""
    tokens = max(1, protected + candidates)
    feeds = {"patches": patches(2, tokens)} if model is vision else {"frames": frames(2, tokens)}
    program = program_of(model(2), feeds)
    reduced, plan = reduce_program(program, policy({"preset": "pitome", "ratio": 0.5}))
    assert [space.size for space in plan.made] == [tokens, tokens]
    assert not [node for node in reduced.graph.nodes if node.meta.get("tokcc") not in (None, "restore")]
    torch.testing.assert_close(run_program(reduced, feeds)[0], run_program(program, feeds)[0], rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [[2, 2], [3, 2], [4, 1, 3]])
def test_hardly_any_candidates_when_it_runs(lengths: list[int]) -> None:
    """Where the length is dynamic, or a row is mostly padding, the graph itself has to make no pair."""
    shapes = {name: {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=1, max=60)} for name in ("ids", "mask")}
    step = policy({"preset": "pitome", "ratio": 0.5})
    program = program_of(text(2), sentences([16, 12]), shapes)
    feeds = sentences(lengths)
    outputs = run_program(reduce_program(program, step)[0], feeds)
    eager, plan = run_eager(program, step, feeds)
    for mine, theirs in zip(outputs, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    kept = [1 + (n - 1 - min((n - 1) - math.ceil((n - 1) / 2), (n - 1) // 2)) for n in lengths]
    assert plan.made[0].valid.sum(1).tolist() == kept


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
