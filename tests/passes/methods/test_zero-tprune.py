"""Zero-TPrune against a brute-force reading of arXiv:2305.17328."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.passes.oracle import (
    Cut,
    Feeds,
    Method,
    Model,
    Result,
    Scene,
    compare,
    cosine,
    drop,
    program_of,
    reference,
    share_of,
    top,
)
from tests.passes.reference_models import patches, sentences, text, vision
from tokcc.config import load_policy
from tokcc.ir.builder import EagerBuilder
from tokcc.passes.methods import library
from tokcc.passes.scores.pagerank import PageRank
from tokcc.testing import run_eager


def pagerank(scene: Scene, iterations: tuple[int, int, int], low: float = 0.01, high: float = 0.7) -> list[float]:
    n = scene.n
    squares, used = [0.0] * n, 0
    votes = []
    for head in scene.probs.tolist():
        v = [1 / n] * n
        for _ in range(iterations[min(2, 3 * scene.layer // scene.depth)]):
            v = [sum(head[i][j] * v[i] for i in range(n)) for j in range(n)]
            assert sum(v) == pytest.approx(1, abs=1e-5)
        variance = sum((n * value - 1) ** 2 for value in v) / n
        votes.append((v, low <= variance <= high))
    everyone = not any(counts for _, counts in votes)
    for v, counts in votes:
        if counts or everyone:
            used += 1
            squares = [total + value**2 for total, value in zip(squares, v, strict=True)]
    return [(total / used) ** 0.5 for total in squares]


def left_over(scene: Scene, left: list[int]) -> Scene:
    """The attention among some tokens, its rows summing to one again; the class token stays a voter."""
    there = [0, *sorted(left)]
    probs = scene.probs[:, there][:, :, there]
    return replace(scene, x=scene.x[there], probs=probs / probs.sum(-1, keepdim=True))


def zero_tprune(keep: float, duplicates: int, iterations: tuple[int, int, int], *, again: bool = False) -> Method:
    def method(scene: Scene) -> Cut | None:
        importance = pagerank(scene, iterations)
        keys = scene.keys.transpose(0, 1).flatten(1)
        order = top(importance, range(1, scene.n), scene.n - 1)
        half = (len(order) + 1) // 2
        better, worse = order[:half], order[half:]
        twin = {a: max(cosine(keys[a], keys[b]) for b in better) for a in worse}
        gone = sorted(worse, key=lambda a: -twin[a])[: min(duplicates, len(worse))]
        left = [i for i in order if i not in gone]
        if again:
            there = [0, *sorted(left)]
            second = dict(zip(there, pagerank(left_over(scene, left), iterations), strict=True))
            left = sorted(left, key=lambda i: -second[i])
        return drop(scene, [0, *sorted(left[: share_of(len(left), keep)])])

    return method


def check(
    model: Model, feeds: Feeds, keep: float, duplicates: int, *, again: bool = False, **kwargs: Any
) -> list[Result]:
    iterations = (8, 3, 1)
    step = {"preset": "zero-tprune", "keep": keep, "duplicates": duplicates, "iterations": list(iterations)}
    if again:
        step["again"] = {"kind": "pagerank", "iterations": list(iterations)}

    def oracle(sample: Feeds) -> Result:
        method = zero_tprune(keep, duplicates, iterations, again=again)
        return reference(model, sample, method, layers=range(len(model.blocks)))

    return compare(model, feeds, step, oracle, **kwargs)


def test_images() -> None:
    results = check(vision(), {"patches": patches(2, 33)}, 0.9, 4)
    assert results[0].lengths == [27, 21, 16, 11]


def test_ranking_what_is_left_again() -> None:
    """The second stage on the attention among the tokens that the first one left."""
    check(vision(), {"patches": patches(2, 33)}, 0.8, 4, again=True, engine=True)
    check(text(), sentences([16, 11, 6]), 0.8, 3, again=True)


def test_padded_rows_are_what_they_are_alone() -> None:
    check(text(), sentences([16, 11, 6, 3]), 0.9, 3)


def test_default_layers_of_twelve() -> None:
    (step,) = load_policy("zero-tprune", presets=library()).policy.steps
    assert step.at.resolve(12) == (1, 3, 6, 9, 11)
    assert library()["zero-tprune"].params["duplicates"].default == 10


def test_one_iteration_is_the_column_mean_and_stays_a_distribution() -> None:
    """From a uniform start, one vote gives the column mean of the attention matrix."""
    n = 12
    probs = torch.rand(2, 3, n, n, generator=torch.Generator().manual_seed(0)).softmax(-1)

    class Site:
        b, tokens, valid, layer, num_layers, x = EagerBuilder(), n, None, 5, 6, probs

        @staticmethod
        def attention() -> Any:
            class View:
                pass

            view = View()
            view.probs = probs  # type: ignore[attr-defined]
            return view

    score = PageRank(iterations=(9, 9, 1), min_variance=0.0, max_variance=1e9).emit(Site())  # type: ignore[arg-type]
    torch.testing.assert_close(score, probs.mean(2).square().mean(1).sqrt())


def test_nothing_but_duplicates() -> None:
    """keep = 1 drops only near-duplicates."""
    feeds = {"patches": patches(1, 33)}
    step = {"preset": "zero-tprune", "keep": 1.0, "duplicates": 5}
    _, plan = run_eager(program_of(vision(), feeds), {"version": 1, "steps": [step]}, feeds)
    assert [space.size for space in plan.made] == [28, 23, 18, 13]
