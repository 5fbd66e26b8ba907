"""The graph part of Token Condensation as Adaptation against a brute-force reading of arXiv:2410.14729."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from tests.passes.oracle import (
    Cut,
    Feeds,
    Method,
    Result,
    Scene,
    compare,
    drop,
    policy,
    program_of,
    reference,
    share_of,
    top,
)
from tests.passes.reference_models import patches, sentences, text, vision
from tokcc.errors import AxisError
from tokcc.testing import reduce_program, run_eager, trace

LAYERS = (1, 2, 3)


def coreset(x: list[Tensor], centres: int) -> list[tuple[int, Tensor]]:
    """k-centre greedy from the first; (which token, mean of its cluster by inverse distance)."""
    picked = [0]
    while len(picked) < min(centres, len(x)):
        far = [min(float((token - x[p]).norm()) for p in picked) for token in x]
        picked.append(far.index(max(far)))
    clusters: dict[int, list[tuple[float, Tensor]]] = {p: [(1.0, x[p])] for p in picked}
    for i, token in enumerate(x):
        if i in picked:
            continue
        apart = [float((token - x[p]).norm()) for p in picked]
        clusters[picked[apart.index(min(apart))]].append((1 / min(apart), token))
    return [
        (p, sum((w * t for w, t in members), torch.zeros_like(x[0])) / sum(w for w, _ in members))
        for p, members in clusters.items()
    ]


def attention(scene: Scene) -> list[float]:
    heads = len(scene.probs)
    return [sum(float(scene.probs[h, 0, j]) for h in range(heads)) / heads for j in range(scene.n)]


def ranks(scene: Scene) -> list[float]:
    """Per head, the share of patches that are not better; the mean over heads."""
    row = scene.probs[:, 0].tolist()
    patch = range(1, scene.n)
    votes = [sum(head[i] <= head[j] for head in row for i in patch) for j in patch]  # whole numbers, which tie
    return [0.0, *(vote / len(row) / (scene.n - 1) for vote in votes)]


def tca(rate: float, centres: int = 4, score_of: Callable[[Scene], list[float]] = attention) -> Method:
    def method(scene: Scene) -> Cut | None:
        m, score = scene.n - 1, score_of(scene)
        left = share_of(m, rate)
        doubtful = 2 * (scene.n - left)
        order = top(score, range(1, scene.n), m)
        if left == m:
            return Cut(list(range(scene.n)), scene.x)
        kept, middle, rest = order[: left - doubtful], order[left - doubtful : left], order[left:]
        found = coreset([scene.x[i] for i in middle], centres)
        fused = sum((score[i] * scene.x[i] for i in rest), torch.zeros_like(scene.x[0]))
        tokens = [scene.x[i] for i in (0, *sorted(kept))] + [mean for _, mean in found] + [fused]
        return Cut([0, *sorted(kept), *(middle[p] for p, _ in found), -1], torch.stack(tokens))

    return method


def check(feeds: Feeds, rate: float, centres: int = 4, **kwargs: Any) -> list[Result]:
    def oracle(sample: Feeds) -> Result:
        return reference(vision(), sample, tca(rate, centres), layers=LAYERS)

    step = {"preset": "tca", "rate": rate, "centres": centres}
    return compare(vision(), feeds, step, oracle, **kwargs)


@pytest.mark.parametrize("rate", [0.9, 0.8])
def test_images(rate: float) -> None:
    results = check({"patches": patches(3, 50)}, rate, engine=True)
    assert results[0].lengths == {0.9: [41, 32, 26], 0.8: [26, 14, 11]}[rate]


def test_ranks_of_heads() -> None:
    def oracle(sample: Feeds) -> Result:
        return reference(vision(), sample, tca(0.9, score_of=ranks), layers=LAYERS)

    feeds = {"patches": patches(3, 50)}
    compare(vision(), feeds, {"preset": "tca", "rate": 0.9, "score": {"kind": "head_ranks"}}, oracle, engine=True)


def test_ranks_of_heads_with_padding_and_dynamic_lengths() -> None:
    step = {"node": "prune", "at": {"layers": [1, 2]}, "score": {"kind": "head_ranks"}, "budget": {"keep": 0.6}}

    def pruned(scene: Scene) -> Cut:
        score = ranks(scene)
        return drop(scene, [0, *sorted(top(score, range(1, scene.n), share_of(scene.n - 1, 0.6)))])

    for model, feeds, shapes in (
        (text(), sentences([20, 13, 6]), None),
        (vision(), {"patches": patches(3, 38)}, {"patches": {0: Dim("b", min=1, max=9), 1: Dim("s", min=4, max=100)}}),
    ):
        compare(model, feeds, step, partial(reference, model, method=pruned, layers=[1, 2]), dynamic=shapes)


def test_one_centre_and_many() -> None:
    check({"patches": patches(2, 40)}, 0.9, centres=1)
    check({"patches": patches(2, 40)}, 0.9, centres=9)


def test_nothing_left_for_the_first_tier() -> None:
    """The second tier takes all that the budget leaves."""
    step = {"preset": "tca", "rate": 0.5, "at": {"layers": [1]}}
    feeds = {"patches": patches(2, 12)}
    _, plan = reduce_program(program_of(vision(), feeds), policy(step))
    assert plan.made[0].size == 1 + 4 + 1


def test_dynamic_batch() -> None:
    shapes = {"patches": {0: Dim("batch", min=1, max=9)}}
    check({"patches": patches(3, 30)}, 0.9, engine=True, dynamic=shapes, traced={"patches": patches(2, 30)})


@torch.no_grad()
def test_equal_tokens_condense_to_themselves() -> None:
    model = copy.deepcopy(vision())
    model.positions.data.zero_()
    feeds = {"patches": patches(1, 2).expand(-1, 29, -1).contiguous()}
    step = {"preset": "tca", "rate": 0.9, "at": {"layers": [3], "site": "block_output"}}
    tokens = run_eager(trace(model, feeds), policy(step), feeds)[0][0][0]
    assert len(tokens) == 1 + 21 + 4 + 1
    torch.testing.assert_close(tokens[-5:-1], tokens[1:2].expand(4, -1), rtol=0, atol=1e-4)


def test_padding_and_dynamic_lengths_are_refused() -> None:
    with pytest.raises(AxisError, match="three tiers of a ranking have the same sizes"):
        reduce_program(program_of(text(), sentences([12, 7])), policy("tca"))
    shapes = {"patches": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=100)}}
    program = program_of(vision(), {"patches": patches(2, 26)}, shapes)
    with pytest.raises(AxisError, match="tiers of a ranking have fixed sizes"):
        reduce_program(program, policy("tca"))
