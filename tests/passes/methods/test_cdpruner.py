"""CDPruner (arXiv:2506.10967) against determinants in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.export import Dim

from tests.passes.guided import choosing, texts, words_of
from tests.passes.oracle import Feeds, Scene, compare, policy, program_of
from tests.passes.reference_models import WIDTH, audio, frames, patches, sentences, text, vision
from tokcc.errors import AxisError
from tokcc.testing import run_eager

Choice = Callable[[Tensor, Scene, Feeds], list[int]]


def unit(x: Any) -> np.ndarray:
    values = np.asarray(x, dtype=np.float64)
    normed: np.ndarray = values / np.linalg.norm(values, axis=1, keepdims=True)
    return normed


def greedy(kernel: np.ndarray, count: int, first: int | None = None) -> list[int]:
    picked: list[int] = [] if first is None else [first]
    while len(picked) < min(count, len(kernel)):
        left = [i for i in range(len(kernel)) if i not in picked]
        grown = {i: np.linalg.slogdet(kernel[np.ix_([*picked, i], [*picked, i])])[1] for i in left}
        picked.append(max(left, key=lambda i: grown[i]))
    return picked


def cdpruner(
    count: int, *, sign: int = 1, embed: Callable[[Tensor], Tensor] | None = None, theta: float | None = None
) -> Choice:
    def choose(z: Tensor, scene: Scene, sample: Feeds) -> list[int]:
        del scene
        words, embedded = unit(words_of(sample)), unit(z if embed is None else embed(z))
        relevance = np.array([sign * sum(e @ w for w in words) / len(words) for e in embedded])
        relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min() + 1e-6)
        if theta is not None:
            relevance = np.exp(theta / (2 * (1 - theta)) * relevance)
        kernel = relevance[:, None] * (unit(z) @ unit(z).T) * relevance[None]
        return greedy(kernel, count)

    return choose


def test_images() -> None:
    feeds = {"patches": patches(3, 65), **texts([3, 1, 2])}
    step = {"preset": "cdpruner", "tokens": 16}
    results = compare(
        vision(), feeds, step, choosing(vision(), 1, cdpruner(16)), traced={"patches": patches(3, 65)}, engine=True
    )
    assert results[0].lengths == [17]


def test_in_clips_space(tmp_path: Path) -> None:
    """Patches go through a trained norm and projection, and the cosine is negated."""
    generator = torch.Generator().manual_seed(2)
    weights = {
        "norm.weight": torch.randn(WIDTH, generator=generator),
        "norm.bias": torch.randn(WIDTH, generator=generator),
        "projection.weight": torch.randn(20, WIDTH, generator=generator),
    }
    save_file(weights, tmp_path / "tower.safetensors")

    def embed(z: Tensor) -> Tensor:
        y = F.layer_norm(z, (WIDTH,), weights["norm.weight"], weights["norm.bias"])
        return y @ weights["projection.weight"].T

    step = {"preset": "cdpruner", "tokens": 9, "projection": True, "sign": -1}
    feeds = {"patches": patches(2, 50), **texts([2, 2], width=20)}
    choice = cdpruner(9, sign=-1, embed=embed)
    compare(
        vision(),
        feeds,
        {**step, "weights": str(tmp_path / "tower.safetensors")},
        choosing(vision(), 1, choice),
        traced={"patches": patches(2, 50)},
    )


def test_sharpened() -> None:
    feeds = {"frames": frames(2, 30), **texts([1, 2], rows=4)}
    step = {"preset": "cdpruner", "tokens": 7, "sharpness": 0.6}
    compare(audio(), feeds, step, choosing(audio(), 0, cdpruner(7, theta=0.6)), traced={"frames": frames(2, 30)})


def test_dynamic_number_of_tokens_and_rows() -> None:
    shapes = {"frames": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=60)}}
    for tokens, counts in ((25, [3, 1, 5]), (6, [2, 2, 2])):
        compare(
            audio(2),
            {"frames": frames(3, tokens), **texts(counts)},
            {"preset": "cdpruner", "tokens": 6},
            choosing(audio(2), 0, cdpruner(6)),
            dynamic=shapes,
            traced={"frames": frames(2, 16)},
        )


def test_padded_rows_are_what_they_are_alone() -> None:
    feeds = {**sentences([20, 12, 4]), **texts([2, 1, 3])}
    compare(
        text(),
        feeds,
        {"preset": "cdpruner", "tokens": 5},
        choosing(text(), 1, cdpruner(5)),
        traced=sentences([20, 12, 4]),
    )


def test_padded_rows_with_a_share_are_refused() -> None:
    feeds = {**sentences([20, 12]), **texts([1, 1])}
    with pytest.raises(AxisError, match="same number of tokens"):
        run_eager(
            program_of(text(), sentences([20, 12])), policy({"preset": "cdpruner", "budget": {"keep": 0.5}}), feeds
        )


def test_without_guidance_diversity_alone_decides() -> None:
    """A text of zeros rates all tokens alike, and the guard keeps that from dividing by zero."""
    feeds = {"frames": frames(2, 20), "text": torch.zeros(2, 1, WIDTH), "text_count": torch.ones(2, dtype=torch.int64)}
    step = {"preset": "cdpruner", "tokens": 6}
    _, plan = run_eager(program_of(audio(), {"frames": frames(2, 20)}), policy(step), feeds)
    with torch.no_grad():
        z = audio()(frames(2, 20))["tokens"]
    for row, own in zip(plan.made[0].index.tolist(), z, strict=True):
        # The first pick is a tie of all tokens, which goes to the first one.
        assert row == sorted(greedy(unit(own) @ unit(own).T, 6, first=0))


def test_the_length_of_tokens_does_not_matter() -> None:
    """The kernel is of cosines: the selection stays when single tokens grow."""
    feeds = {"frames": frames(1, 20), **texts([2])}
    program = program_of(audio(), {"frames": frames(1, 20)})
    step = policy({"preset": "cdpruner", "tokens": 6})
    _, plan = run_eager(program, step, feeds)
    _, other = run_eager(program, step, {**feeds, "text": 7 * feeds["text"]})
    assert torch.equal(plan.made[0].index, other.made[0].index)
