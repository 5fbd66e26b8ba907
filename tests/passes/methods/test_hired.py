"""HiRED (arXiv:2408.10945) against loops in Python: a batch is one image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from tests.passes.oracle import Scene, inputs_of, policy, program_of, reference, run_engine, top
from tests.passes.reference_models import patches, vision
from tests.passes.test_pieces import make_cut
from tokcc.errors import AxisError
from tokcc.passes.scores.attention_rows import AttentionRows
from tokcc.passes.selectors.crop_quotas import CropQuotas
from tokcc.testing import reduce_program, run_eager, run_program


def scenes_of(x: Tensor) -> list[Scene]:
    """What the encoder's last layer is, crop by crop, with the final norm applied."""
    found: list[Scene] = []

    def seen(scene: Scene) -> None:
        scene.x = vision().norm(scene.x)
        found.append(scene)

    for sample in inputs_of({"patches": x}):
        reference(vision(), sample, seen, layers=(3,), at_end=True)
    return found


def crop_of(i: int, n: int, rows: int, columns: int, region: str) -> int:
    if region == "bands":
        return i // (n // (rows * columns))
    side = round(n**0.5)
    return (i // side) // (side // rows) * columns + (i % side) // (side // columns)


def hired(
    scenes: list[Scene], keep: float, alpha: float, rows: int = 2, columns: int = 2, region: str = "rect"
) -> list[list[int]]:
    """Return the kept patches of each crop, counted without the class token."""
    n = scenes[0].n - 1
    late = [scene.rows[-1].sum(0)[1:].tolist() for scene in scenes]
    total = int(len(scenes) * n * keep)
    if len(scenes) == 1:
        return [sorted(top(late[0], range(n), total))]
    own = min(int(total * alpha), n)
    rest = min(total - own, (len(scenes) - 1) * n)
    early = scenes[0].rows[0].sum(0)[1:].tolist()
    count = [0] * (len(scenes) - 1)
    for i in top(early, range(n), int(n * (1 - alpha))):
        count[crop_of(i, n, rows, columns, region)] += 1
    quota = [min(rest * c // max(1, sum(count)), n) for c in count]
    assert sum(quota) <= rest
    kept = [top(late[0], range(n), own), *(top(s, range(n), k) for s, k in zip(late[1:], quota, strict=True))]
    left = [(late[p][i], p, i) for p in range(1, len(scenes)) for i in range(n) if i not in kept[p]]
    for _, p, i in sorted(left, reverse=True)[: rest - sum(quota)]:
        kept[p].append(i)
    return [sorted(crop) for crop in kept]


@pytest.mark.parametrize(
    ("keep", "alpha", "region"),
    [(0.2, 0.5, "rect"), (0.2, 0.5, "bands"), (0.11, 0.3, "rect"), (0.1, 1.0, "rect"), (0.6, 0.0, "rect")],
)
def test_crops(keep: float, alpha: float, region: str) -> None:
    x = patches(5, 65)
    step = policy({"preset": "hired", "keep": keep, "alpha": alpha, "region": region})
    program = program_of(vision(), {"patches": x})
    reduced, _ = reduce_program(program, step)
    outputs = dict(zip(reduced.output_names, run_engine(reduced, {"patches": x}), strict=True))
    scenes = scenes_of(x)
    wanted = hired(scenes, keep, alpha, region=region)
    valid, index = outputs["tokens.token_valid"], outputs["tokens.token_index"]
    assert int(valid[:, 1:].sum()) == int(5 * 64 * keep)
    for p, kept in enumerate(wanted):
        assert index[p][valid[p]].tolist() == [0, *(i + 1 for i in kept)]
        rows = torch.stack([scenes[p].x[0], *(scenes[p].x[i + 1] for i in kept)])
        torch.testing.assert_close(outputs["tokens"][p][valid[p]], rows, rtol=0, atol=1e-4)
        torch.testing.assert_close(outputs["pooled"][p], vision().head(scenes[p].x[0]), rtol=0, atol=1e-4)


def test_crops_in_another_arrangement() -> None:
    x = patches(4, 37)
    step = policy({"preset": "hired", "keep": 0.3, "rows": 1, "columns": 3})
    _, plan = run_eager(program_of(vision(), {"patches": x}), step, {"patches": x})
    space = plan.made[0]
    for p, kept in enumerate(hired(scenes_of(x), 0.3, 0.5, 1, 3)):
        assert space.index[p][space.valid[p]].tolist() == [0, *(i + 1 for i in kept)]


def test_full_output_has_all_tokens() -> None:
    x = patches(5, 65)
    program = program_of(vision(), {"patches": x})
    reduced, plan = reduce_program(program, policy({"preset": "hired"}, "full"))
    tokens = run_program(reduced, {"patches": x})[0]
    torch.testing.assert_close(tokens, run_program(program, {"patches": x})[0], rtol=0, atol=1e-5)
    assert len(plan.reductions) == 1


def test_one_image_keeps_the_budget_for_itself() -> None:
    """As FasterVLM does, up to the sum over heads instead of their mean."""
    x = patches(1, 65)
    program = program_of(vision(), {"patches": x})
    mine, _ = run_eager(program, policy("hired"), {"patches": x})
    theirs, _ = run_eager(program, policy({"preset": "fastervlm", "tokens": int(64 * 0.2)}), {"patches": x})
    assert torch.equal(mine[0], theirs[0])


def test_a_number_of_tokens_is_the_image_s() -> None:
    """More than one crop has, and no warning about it."""
    x = patches(5, 65)
    step = policy({"preset": "hired", "budget": {"tokens": 100}})
    _, plan = run_eager(program_of(vision(), {"patches": x}), step, {"patches": x})
    assert int(plan.made[0].valid[:, 1:].sum()) == 100
    assert plan.warnings == ()


@pytest.mark.parametrize(
    ("batch", "tokens", "step", "message"),
    [
        (3, 65, {}, "the batch has 3 images"),
        (5, 41, {}, "40 tokens of the thumbnail are no square"),
    ],
)
def test_refusals(batch: int, tokens: int, step: dict[str, Any], message: str) -> None:
    feeds = {"patches": patches(batch, tokens)}
    with pytest.raises(AxisError, match=message):
        run_eager(program_of(vision(), feeds), policy({"preset": "hired", **step}), feeds)


def test_a_dynamic_batch_is_refused() -> None:
    shapes = {"patches": {0: Dim("batch", min=1, max=9)}}
    images = program_of(vision(1), {"patches": patches(5, 26)}, shapes)
    with pytest.raises(AxisError, match="number is not fixed"):
        reduce_program(images, policy("hired"))


def test_padding_is_refused() -> None:
    with pytest.raises(AxisError, match="padded"):
        CropQuotas(content=AttentionRows()).select(make_cut(5, lengths=[15, 9]), torch.rand(2, 15))
