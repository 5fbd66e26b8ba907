"""EViT against a brute-force reading of arXiv:2202.07800."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
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
    drop,
    policy,
    program_of,
    reference,
    share_of,
    top,
)
from tests.passes.reference_models import patches, sentences, text, vision
from tokcc.config import load_policy
from tokcc.passes.methods import library
from tokcc.testing import plan_for, reduce_program, run_eager, run_program, trace

LAYERS = (1, 2, 3)


def evit(keep: float, *, fuse: bool = True) -> Method:
    def method(scene: Scene) -> Cut | None:
        heads = len(scene.probs)
        attention = [sum(float(scene.probs[h, 0, j]) for h in range(heads)) / heads for j in range(scene.n)]
        count = share_of(scene.n - 1, keep)
        kept = [0, *sorted(top(attention, range(1, scene.n), count))]
        rest = [j for j in range(scene.n) if j not in kept]
        if not fuse or not rest:
            return drop(scene, kept)
        fused = sum((attention[j] * scene.x[j] for j in rest), torch.zeros_like(scene.x[0]))
        return Cut([*kept, -1], torch.cat([scene.x[kept], fused[None]]))

    return method


def check(model: Model, feeds: Feeds, step: Mapping[str, Any], **kwargs: Any) -> list[Result]:
    method = evit(step["keep"], fuse=step.get("fuse_rest", "fuse_rest") == "fuse_rest")

    def oracle(sample: Feeds) -> Result:
        return reference(model, sample, method, layers=sorted({len(model.blocks) * i // 4 for i in (1, 2, 3)}))

    return compare(model, feeds, {"preset": "evit", **step}, oracle, **kwargs)


def test_default_layers_of_twelve() -> None:
    (step,) = load_policy("evit", presets=library()).policy.steps
    assert step.at.resolve(12) == (3, 6, 9)
    assert step.budget.keep == 0.7


@pytest.mark.parametrize("tokens", [65, 50])
def test_images(tokens: int) -> None:
    results = check(vision(), {"patches": patches(3, tokens)}, {"keep": 0.7})
    n, expected = tokens, []
    for _ in LAYERS:
        n = 1 + -(-7 * (n - 1) // 10) + 1
        expected.append(n)
    assert all(result.lengths == expected for result in results)


def test_dropping_without_fusing() -> None:
    results = check(vision(), {"patches": patches(3, 50)}, {"keep": 0.5, "fuse_rest": "drop"}, full=True)
    assert results[0].lengths == [26, 14, 8]


def test_two_ways_to_write_fusing() -> None:
    """``{kind: drop, fuse_rest: true}`` in the long form is the preset's reducer."""
    feeds = {"patches": patches(2, 50)}
    program = program_of(vision(), feeds)
    found = []
    for reduce in ({"kind": "fuse_rest"}, {"kind": "drop", "fuse_rest": True}):
        reduced, _ = reduce_program(program, policy({"preset": "evit", "reduce": reduce}))
        found.append(run_program(reduced, feeds))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_example_of_the_long_form_can_be_planned() -> None:
    path = Path(__file__).parents[3] / "examples" / "policies" / "prune-then-merge.yaml"
    plan = plan_for(trace(vision(7), {"patches": patches(2, 50)}), path)
    assert [(r.layer, r.reduce.kind) for r in plan.reductions] == [
        (4, "drop"),
        (5, "weighted_mean"),
        (6, "weighted_mean"),
    ]
    assert plan.reductions[0].reduce.model_dump() == {"fuse_rest": True, "align": "none"}


def test_one_token_kept() -> None:
    results = check(vision(), {"patches": patches(2, 10)}, {"keep": 0.05})
    assert results[0].lengths == [3, 3, 3]


def test_nothing_dropped_makes_no_fused_token() -> None:
    """ceil(0.95 * 9) = 9: the tokens are as they were, and no empty token attends."""
    feeds = {"patches": patches(2, 10)}
    results = check(vision(), feeds, {"keep": 0.95})
    assert results[0].lengths == [10, 10, 10]
    with torch.no_grad():
        dense = vision()(**feeds)["pooled"]
    reduced, _ = reduce_program(program_of(vision(), feeds), policy({"preset": "evit", "keep": 0.95}))
    torch.testing.assert_close(run_program(reduced, feeds)[1], dense, rtol=0, atol=1e-5)


@torch.no_grad()
def test_mass_is_kept() -> None:
    """The attention-weighted sum over patches equals that over the kept ones plus the fused token."""
    feeds = {"patches": patches(1, 50)}
    seen: list[Scene] = []

    def spy(scene: Scene) -> Cut | None:
        seen.append(scene)
        return evit(0.6)(scene)

    result = reference(vision(), feeds, spy, layers=(1,))
    (scene,), (cut,) = seen, result.cuts
    weights = scene.probs[:, 0].mean(0)
    kept = cut.kept[1:-1]
    _, plan = run_eager(
        program_of(vision(), feeds), policy({"preset": "evit", "keep": 0.6, "at": {"layers": [1]}}), feeds
    )
    assert plan.made[0].index[0, 1:-1].tolist() == kept
    torch.testing.assert_close(weights[1:] @ scene.x[1:], weights[kept] @ scene.x[kept] + cut.x[-1], rtol=0, atol=1e-5)


def test_padded_rows_are_what_they_are_alone() -> None:
    check(text(), sentences([4, 3]), {"keep": 0.7})
    results = check(text(), sentences([20, 13, 4, 2]), {"keep": 0.7})
    assert [result.lengths[0] for result in results] == [16, 11, 4, 2]
    check(text(), sentences([20, 13, 4, 2]), {"keep": 0.5, "fuse_rest": "drop"}, full=True)


def test_dynamic_batch_and_resolution() -> None:
    shapes = {"patches": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=3, max=100)}}
    for tokens in (38, 4):
        feeds = {"patches": patches(3, tokens)}
        check(vision(2), feeds, {"keep": 0.7}, dynamic=shapes, traced={"patches": patches(2, 26)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, feeds = copy.deepcopy(vision()).to(dtype), {"patches": patches(2, 50).to(dtype)}
    reduced, _ = reduce_program(trace(model, feeds), policy("evit"))
    pooled = run_program(reduced, feeds)[1]
    assert pooled.dtype == dtype
    exact = reference(vision(), {"patches": patches(2, 50)[:1]}, evit(0.7), layers=LAYERS).pooled
    assert exact is not None
    assert (pooled[0].float() - exact).abs().max() < 0.15
