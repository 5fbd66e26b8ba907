"""Token Transforming against a brute force of ``x' = W x`` (arXiv:2506.05709; the form of W is ours)."""

from __future__ import annotations

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
    drop,
    policy,
    program_of,
    reference,
    share_of,
    top,
)
from tests.passes.reference_models import patches, sentences, text, vision
from tokcc.testing import reduce_program, run_program

LAYERS = (1, 2, 3)


def assignment(scene: Scene, keep: float, temperature: float, neighbours: int | None) -> tuple[list[int], torch.Tensor]:
    """The informative tokens, and how much of each token goes into them, ``[K, N]``; the class token stays itself."""
    heads = len(scene.probs)
    attention = [sum(float(scene.probs[h, 0, j]) for h in range(heads)) / heads for j in range(scene.n)]
    kept = sorted(top(attention, range(1, scene.n), share_of(scene.n - 1, keep)))
    matrix = torch.zeros(len(kept) + 1, scene.n)
    matrix[0, 0] = 1
    for row, i in enumerate(kept, start=1):
        like = {j: cosine(scene.x[i], scene.x[j]) for j in range(1, scene.n)}
        nearest = sorted(like, key=lambda j: -like[j])[:neighbours]
        parts = {j: float(scene.sizes[j]) * math.exp(like[j] / temperature) for j in nearest}
        for j, part in parts.items():
            matrix[row, j] = part / sum(parts.values())
    return [0, *kept], matrix


def token_transforming(keep: float, temperature: float, neighbours: int | None) -> Method:
    def method(scene: Scene) -> Cut | None:
        kept, matrix = assignment(scene, keep, temperature, neighbours)
        if len(kept) == scene.n:
            return Cut(kept, scene.x, sizes=scene.sizes)
        sizes = (matrix / matrix.sum(0, keepdim=True).clamp_min(1e-30)) @ scene.sizes
        return Cut(kept, matrix @ scene.x, sizes=sizes)

    return method


def check(model: Model, feeds: Feeds, step: dict[str, Any], **kwargs: Any) -> list[Result]:
    layers = step.pop("layers", LAYERS)
    method = token_transforming(step["keep"], step.get("temperature", 0.1), step.get("neighbours"))
    prop = step.get("prop_attn", True)

    def oracle(sample: Feeds) -> Result:
        return reference(model, sample, method, layers=layers, prop_attn=prop)

    return compare(model, feeds, {"preset": "token-transforming", **step}, oracle, **kwargs)


@pytest.mark.parametrize("step", [{"keep": 0.7}, {"keep": 0.5, "temperature": 0.5}, {"keep": 0.6, "prop_attn": False}])
def test_images(step: dict[str, Any]) -> None:
    results = check(vision(), {"patches": patches(3, 34)}, dict(step), engine=True)
    assert results[0].lengths == {0.7: [25, 18, 13], 0.5: [18, 10, 6], 0.6: [21, 13, 9]}[step["keep"]]
    if step.get("prop_attn", True):
        for result in results:
            assert result.cuts[-1].sizes is not None
            assert float(result.cuts[-1].sizes.sum()) == pytest.approx(34, rel=1e-5)


def test_few_neighbours() -> None:
    """Sizes no longer add up: what is in no output is gone."""
    check(vision(), {"patches": patches(3, 30)}, {"keep": 0.5, "neighbours": 4}, engine=True)


def test_padded_rows_are_what_they_are_alone() -> None:
    check(text(), sentences([20, 13, 5]), {"keep": 0.7})
    check(text(), sentences([20, 13, 5]), {"keep": 0.7, "neighbours": 3})


def test_dynamic_batch_and_resolution() -> None:
    shapes = {"patches": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=100)}}
    for tokens in (38, 6):
        feeds = {"patches": patches(3, tokens)}
        check(
            vision(2),
            feeds,
            {"keep": 0.7, "layers": (0, 1)},
            engine=True,
            dynamic=shapes,
            traced={"patches": patches(2, 26)},
        )


def test_a_low_temperature_is_pruning() -> None:
    def pruned(scene: Scene) -> Cut | None:
        return drop(scene, assignment(scene, 0.6, 0.1, None)[0])

    def oracle(sample: Feeds) -> Result:
        return reference(vision(), sample, pruned, layers=LAYERS)

    step = {"preset": "token-transforming", "keep": 0.6, "temperature": 0.001, "prop_attn": False}
    compare(vision(), {"patches": patches(2, 20)}, step, oracle)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[18, 18], [18, 11, 4]])
def test_tokens_are_given_back_by_shares(lengths: list[int]) -> None:
    """A post-norm encoder ends in its last block, so what comes back is a mean of the reduced outputs."""
    feeds = sentences(lengths)
    step = {"preset": "token-transforming", "keep": 0.5, "at": {"layers": [2]}, "restore": "unmerge"}
    program = program_of(text(), feeds)
    full = run_program(reduce_program(program, policy(step, "full"))[0], feeds)[0]
    seen: list[torch.Tensor] = []

    def spy(scene: Scene) -> Cut | None:
        seen.append(assignment(scene, 0.5, 0.1, None)[1])
        return token_transforming(0.5, 0.1, None)(scene)

    for row, length in enumerate(lengths):
        sample = {name: values[row : row + 1, :length] for name, values in feeds.items()}
        result = reference(text(), sample, spy, layers=[2])
        shares = seen[-1] / seen[-1].sum(0, keepdim=True)
        torch.testing.assert_close(full[row, :length], shares.T @ result.tokens, rtol=0, atol=1e-4)
