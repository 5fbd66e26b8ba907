"""Adjacent Token Merging (arXiv:2306.16009) against a brute-force greedy."""

from __future__ import annotations

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
)
from tests.passes.reference_models import audio, frames, sentences, text
from tokcc.config import load_policy
from tokcc.passes.methods import library
from tokcc.testing import run_eager


def a_tome(rate: float, *, protected: int = 0, parity: bool = False, sized: bool = False) -> Method:
    def method(scene: Scene) -> Cut | None:
        key = [sum(scene.keys[h, i] for h in range(len(scene.keys))) for i in range(scene.n)]
        joints = range(protected, scene.n - 1, 2 if parity else 1)
        similarity = {i: cosine(key[i], key[i + 1]) for i in joints}
        wanted = int(rate * (scene.n - protected - 1) + 1e-9)
        chosen: list[int] = []
        for i in sorted(similarity, key=lambda i: (-similarity[i], i)):
            if len(chosen) < wanted and not {i - 1, i, i + 1} & set(chosen):
                chosen.append(i)
        kept = [i for i in range(scene.n) if i - 1 not in chosen]
        return merge(scene, kept, [(i + 1, i) for i in chosen], sized=sized)

    return method


def check(model: Model, feeds: Feeds, total: float, layers: list[int], protected: int, **kwargs: Any) -> list[Result]:
    options = kwargs.pop("options", {})
    step = {"preset": "a-tome", "total": total, "at": {"layers": layers}, **options}
    rate = 1 - (1 - total) ** (1 / len(layers))
    parity, sized = options.get("pairing") == "parity", options.get("size_weighted", False)

    def oracle(sample: Feeds) -> Result:
        method = a_tome(rate, protected=protected, parity=parity, sized=sized)
        return reference(model, sample, method, layers=layers, prop_attn=False)

    return compare(model, feeds, step, oracle, **kwargs)


@pytest.mark.parametrize("pairing", ["greedy", "parity"])
def test_audio(pairing: str) -> None:
    results = check(
        audio(), {"frames": frames(3, 41)}, 0.4, [0, 2], 0, options={"pairing": pairing}, full=pairing == "greedy"
    )
    # floor(0.2254 * 40) = 9 pairs, then floor(0.2254 * 31) = 6.
    assert results[0].lengths == [32, 26]


def test_weighted_by_size() -> None:
    results = check(audio(), {"frames": frames(2, 30)}, 0.5, [0, 1, 2], 0, options={"size_weighted": True})
    for result in results:
        assert result.cuts[-1].sizes is not None
        assert float(result.cuts[-1].sizes.sum()) == 30


def test_groups_are_neighbours() -> None:
    """Each stage joins at most two tokens, and over all stages every token stands for neighbouring frames."""
    feeds = {"frames": frames(2, 40)}
    step = {"preset": "a-tome", "total": 0.4, "at": {"layers": [0, 1, 2]}}
    outputs, plan = run_eager(program_of(audio(), feeds), policy(step), feeds)
    tokens, group = outputs
    assert group.shape == (2, 40)
    assert torch.equal(group, group.sort(dim=1).values)
    sizes = torch.stack([row.bincount(minlength=tokens.shape[1]) for row in group])
    assert sizes.min() >= 1
    assert (sizes.sum(1) == 40).all()
    for space in plan.made:
        assert space.ascending


@pytest.mark.parametrize("pairing", ["greedy", "parity"])
def test_padded_rows_are_what_they_are_alone(pairing: str) -> None:
    model = text(pooled=False)
    check(model, sentences([20, 13, 6, 2]), 0.4, [0, 1], 0, options={"pairing": pairing})


def test_padded_rows_with_a_class_token() -> None:
    check(text(), sentences([20, 13, 6]), 0.5, [0, 2], 1)


def test_more_pairs_than_greedy_can_promise() -> None:
    """At most a third of the tokens merge in one layer."""
    feeds = {"frames": frames(2, 20)}
    step = {"preset": "a-tome", "budget": {"keep": 0.5}, "at": {"layers": [0]}}
    _, plan = run_eager(program_of(audio(), feeds), policy(step), feeds)
    assert plan.made[0].size == 20 - 7


def test_dynamic_sequence() -> None:
    shapes = {"frames": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=60)}}
    for tokens in (25, 9):
        feeds = {"frames": frames(3, tokens)}
        check(audio(2), feeds, 0.4, [0, 1], 0, dynamic=shapes, traced={"frames": frames(2, 16)})


def test_published_layers() -> None:
    (step,) = load_policy("a-tome", presets=library()).policy.steps
    assert step.at.resolve(12) == (1, 4, 7, 10)
