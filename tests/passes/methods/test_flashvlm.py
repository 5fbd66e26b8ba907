"""FlashVLM (arXiv:2512.20561) against its composition, one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.passes.guided import choosing, texts, words_of
from tests.passes.oracle import Feeds, Scene, compare, cosine, policy, program_of, top
from tests.passes.reference_models import patches, vision
from tokcc.testing import run_eager


def scaled(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low + 1e-6) for value in values]


def flashvlm(count: int, beta: float = 0.5, salient: float = 0.8) -> Callable[[Tensor, Scene, Feeds], list[int]]:
    def choose(z: Tensor, scene: Scene, sample: Feeds) -> list[int]:
        saliency = scaled(scene.rows[-1].mean(0)[1:].tolist())
        relevance = scaled([max(cosine(token, word) for word in words_of(sample)) for token in z])
        rating = [
            (1 - beta) * math.log(v + 1e-6) + beta * math.log(e + 1e-6)
            for v, e in zip(saliency, relevance, strict=True)
        ]
        order = top(rating, range(len(z)), len(z))
        best = int(count * salient)
        members = order[best:]
        while len(members) > count - best:
            even, odd = members[0::2], members[1::2]
            closest = {i: max(cosine(z[i], z[j]) for j in odd) for i in even}
            gone = min(8, len(members) - (count - best), len(even))
            members = [*sorted(even, key=lambda i: -closest[i])[gone:], *odd]
        return [*order[:best], *members]

    return choose


def test_images() -> None:
    feeds = {"patches": patches(3, 65), **texts([3, 1, 2])}
    step = {"preset": "flashvlm", "tokens": 15}
    results = compare(
        vision(), feeds, step, choosing(vision(), 1, flashvlm(15)), traced={"patches": patches(3, 65)}, engine=True
    )
    assert results[0].lengths == [16]


def test_other_weights() -> None:
    feeds = {"patches": patches(2, 50), **texts([2, 2])}
    step = {"preset": "flashvlm", "tokens": 10, "balance": [0.2, 0.8], "salient": 0.5}
    choice = flashvlm(10, 0.8, 0.5)
    compare(vision(), feeds, step, choosing(vision(), 1, choice), traced={"patches": patches(2, 50)})


def test_saliency_alone_is_fastervlm() -> None:
    feeds = {"patches": patches(2, 50), **texts([2, 2])}
    program = program_of(vision(), {"patches": patches(2, 50)})
    steps = [
        {"preset": "flashvlm", "tokens": 10, "balance": [1.0, 0.0], "salient": 1.0},
        {"preset": "fastervlm", "tokens": 10},
    ]
    plans = [run_eager(program, policy(step), feeds)[1] for step in steps]
    assert torch.equal(plans[0].made[0].index, plans[1].made[0].index)


def test_the_length_of_the_texts_vectors_does_not_matter() -> None:
    feeds = {"patches": patches(2, 50), **texts([2, 2])}
    program = program_of(vision(), {"patches": patches(2, 50)})
    step = policy({"preset": "flashvlm", "tokens": 10})
    plans = [run_eager(program, step, {**feeds, "text": factor * feeds["text"]})[1] for factor in (1.0, 9.0)]
    assert torch.equal(plans[0].made[0].index, plans[1].made[0].index)
