"""TokenCorrCompressor (after arXiv:2407.14439) against loops in Python: a batch is one image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.oracle import Scene, cosine, inputs_of, policy, program_of, reference, run_engine, top
from tests.passes.reference_models import patches, vision
from tokcc.errors import AxisError
from tokcc.testing import reduce_program, run_eager, trace


def scenes_of(x: Tensor) -> list[Scene]:
    found: list[Scene] = []

    def seen(scene: Scene) -> None:
        scene.x = vision().norm(scene.x)
        found.append(scene)

    for sample in inputs_of({"patches": x}):
        reference(vision(), sample, seen, layers=(3,), at_end=True)
    return found


def chosen(scenes: list[Scene], keep: float, similar: float, copies: int, shallow: int) -> list[list[int]]:
    n, crops = scenes[0].n - 1, len(scenes)
    keys = [scene.keys.mean(0)[1:] for scene in scenes]
    dense = [
        sum(sum(i == j or cosine(k[i], k[j]) > similar for j in range(n)) <= copies for i in range(n)) for k in keys
    ]
    total = int(crops * n * keep)
    quota = [min(1 + (total - crops) * d // max(1, sum(dense)), n) for d in dense]
    kept: list[list[int]] = []
    for scene, k in zip(scenes, quota, strict=True):
        deep, early = (scene.rows[i].mean(0)[1:].tolist() for i in (scene.layer, shallow))
        first = top(deep, range(n), (k + 1) // 2)
        kept.append([*first, *top(early, [i for i in range(n) if i not in first], k - len(first))])
    early = [scene.rows[shallow].mean(0)[1:].tolist() for scene in scenes]
    left = [(early[p][i], p, i) for p in range(crops) for i in range(n) if i not in kept[p]]
    for _, p, i in sorted(left, reverse=True)[: total - sum(quota)]:
        kept[p].append(i)
    return [sorted(crop) for crop in kept]


def averaged(scene: Scene, kept: list[int]) -> Tensor:
    x, keys = scene.x[1:], scene.keys.mean(0)[1:]
    sums, weight = {i: x[i].clone() for i in kept}, dict.fromkeys(kept, 1.0)
    for j in range(len(x)):
        if j not in kept:
            to = max(kept, key=lambda i: cosine(keys[i], keys[j]))
            s = max(0.0, cosine(keys[to], keys[j]))
            sums[to] += s * x[j]
            weight[to] += s
    return torch.stack([scene.x[0], *(sums[i] / weight[i] for i in kept)])


@pytest.mark.parametrize(("keep", "similar", "copies"), [(0.34, 0.3, 8), (0.2, 0.5, 2), (0.05, 0.0, 30)])
def test_crops(keep: float, similar: float, copies: int) -> None:
    x = torch.cat([patches(3, 50), patches(2, 13, seed=5).repeat(1, 5, 1)[:, :49]])
    feeds = {"patches": x}
    step = policy({"preset": "token-corr", "keep": keep, "similar": similar, "copies": copies, "shallow": 1})
    program = program_of(vision(), feeds)
    reduced, _ = reduce_program(program, step)
    outputs = dict(zip(reduced.output_names, run_engine(reduced, feeds), strict=True))
    scenes = scenes_of(x)
    wanted = chosen(scenes, keep, similar, copies, 1)
    _, plan = run_eager(program, step, feeds)
    valid = plan.made[0].valid
    assert int(valid[:, 1:].sum()) == int(5 * 49 * keep)
    assert len({len(kept) for kept in wanted}) > 1
    for p, kept in enumerate(wanted):
        assert plan.made[0].index[p][valid[p]].tolist() == [0, *(i + 1 for i in kept)]
        torch.testing.assert_close(outputs["tokens"][p][valid[p]], averaged(scenes[p], kept), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_crop_of_one_patch_keeps_one_token_by_its_quota() -> None:
    """All tokens are alike, so its density is zero; there is no rounding to fill up with one other crop."""
    model = vision()
    positions = model.positions.data.clone()
    x = torch.cat([patches(1, 50), patches(1, 2, seed=3).repeat(1, 49, 1)])
    try:
        model.positions.data.zero_()
        feeds = {"patches": x}
        step = policy({"preset": "token-corr", "keep": 0.2, "similar": 0.98, "copies": 20})
        _, plan = run_eager(trace(model, feeds), step, feeds)
    finally:
        model.positions.data.copy_(positions)
    assert plan.made[0].valid[:, 1:].sum(1).tolist() == [int(2 * 49 * 0.2) - 1, 1]


def test_fewer_tokens_than_crops_are_refused() -> None:
    feeds = {"patches": patches(5, 17)}
    with pytest.raises(AxisError, match="4 tokens are kept of 5 crops"):
        run_eager(program_of(vision(), feeds), policy({"preset": "token-corr", "keep": 0.05}), feeds)
