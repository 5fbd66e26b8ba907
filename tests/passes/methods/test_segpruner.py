"""SeGPruner (arXiv:2603.29437) against farthest-point sampling in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.guided import choosing
from tests.passes.oracle import Feeds, Scene, compare, cosine, policy, program_of, top
from tests.passes.reference_models import audio, frames, patches, sentences, text, vision
from tokcc.errors import AxisError
from tokcc.testing import run_eager


def places(batch: int, tokens: int, unknown: float = 0.2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(13)
    return {
        "points": 5 * torch.randn(batch, tokens, 3, generator=generator),
        "points_known": torch.rand(batch, tokens, generator=generator) >= unknown,
    }


def segpruner(
    count: int, important: float = 0.5, lam: float = 0.5, protected: int = 0
) -> Callable[[Tensor, Scene, Feeds], list[int]]:
    def choose(z: Tensor, scene: Scene, sample: Feeds) -> list[int]:
        score = scene.probs.mean(0).mean(0)[protected:].tolist()
        order = top(score, range(len(z)), len(z))
        best = int(count * important)
        salient, others = order[:best], order[best:]
        if best == count:
            return salient
        points, known = sample["points"][0], sample["points_known"][0]

        def length(i: int, j: int) -> float:
            return float((points[i] - points[j]).norm()) if known[i] and known[j] else 0.0

        scale = max(length(others[0], j) for j in others) or 1.0

        def distance(i: int, j: int) -> float:
            apart = 1 - cosine(z[i], z[j])
            return lam * length(i, j) / scale + (1 - lam) * apart if known[i] and known[j] else apart

        picked = [others[0]]
        while len(picked) < count - best:
            left = [i for i in range(len(z)) if i in others and i not in picked]
            picked.append(max(left, key=lambda i: (min(distance(i, j) for j in picked), -i)))
        return [*salient, *picked]

    return choose


@pytest.mark.parametrize(("important", "lam", "unknown"), [(0.5, 0.5, 0.2), (0.0, 1.0, 0.0), (0.25, 0.3, 0.7)])
def test_views(important: float, lam: float, unknown: float) -> None:
    feeds = {"frames": frames(3, 36), **places(3, 36, unknown)}
    step = {"preset": "segpruner", "tokens": 12, "important": important, "space": lam}
    choice = segpruner(12, important, lam)
    compare(audio(), feeds, step, choosing(audio(), 0, choice), traced={"frames": frames(3, 36)}, engine=True)


def world(sample: Feeds, side: int, patch: int) -> dict[str, Tensor]:
    """The mean place of each token's pixels, pixel by pixel."""
    depth, inverse, pose = sample["depth"][0], sample["intrinsics"][0].double().inverse(), sample["pose"][0].double()
    points, known = torch.zeros(side * side, 3), torch.zeros(side * side, dtype=torch.bool)
    for token in range(side * side):
        found = []
        for v in range(token // side * patch, (token // side + 1) * patch):
            for u in range(token % side * patch, (token % side + 1) * patch):
                if depth[v, u] > 0:
                    camera = inverse @ torch.tensor([u, v, 1.0], dtype=torch.float64) * depth[v, u]
                    found.append(pose[:3, :3] @ camera + pose[:3, 3])
        known[token] = bool(found)
        if found:
            points[token] = torch.stack(found).mean(0).float()
    return {"points": points[None], "points_known": known[None]}


def cameras(batch: int, side: int) -> dict[str, Tensor]:
    """Depth with holes, of whole tokens too, behind pinhole cameras anywhere."""
    generator = torch.Generator().manual_seed(17)
    depth = 1 + 4 * torch.rand(batch, side, side, generator=generator)
    depth[torch.rand(batch, side, side, generator=generator) < 0.3] = 0
    depth[:, :5, :9] = 0
    intrinsics = torch.tensor([[20.0, 0, side / 2], [0, 25.0, side / 3], [0, 0, 1]]).repeat(batch, 1, 1)
    turn = torch.linalg.qr(torch.randn(batch, 3, 3, generator=generator)).Q
    pose = torch.cat([turn, torch.randn(batch, 3, 1, generator=generator)], 2)
    return {
        "depth": depth,
        "intrinsics": intrinsics,
        "pose": torch.cat([pose, torch.eye(4)[3:].repeat(batch, 1, 1)], 1),
    }


def test_places_from_depth() -> None:
    feeds = {"patches": patches(2, 37), **cameras(2, 6 * 3)}
    step = {"preset": "segpruner", "tokens": 12, "places": "depth", "patch": 3, "space": 0.7, "important": 0.25}
    run = choosing(vision(), 1, segpruner(12, 0.25, 0.7, protected=1))
    compare(
        vision(),
        feeds,
        step,
        lambda sample: run({**sample, **world(sample, 6, 3)}),
        traced={"patches": patches(2, 37)},
        engine=True,
    )


def test_depth_of_tokens_that_are_no_square() -> None:
    feeds = {"frames": frames(1, 30), **cameras(1, 70)}
    with pytest.raises(AxisError, match="no square"):
        run_eager(
            program_of(audio(), {"frames": frames(1, 30)}),
            policy({"preset": "segpruner", "tokens": 5, "places": "depth"}),
            feeds,
        )


def test_special_tokens_have_no_place() -> None:
    feeds = {"patches": patches(2, 37), **places(2, 36)}
    step = {"preset": "segpruner", "tokens": 10}
    choice = segpruner(10, protected=1)
    compare(vision(), feeds, step, choosing(vision(), 1, choice), traced={"patches": patches(2, 37)})


def test_without_space_no_input_is_added() -> None:
    """Farthest points by features alone, from the most important of the rest on."""
    feeds: dict[str, Any] = {"frames": frames(2, 30)}
    step = {"preset": "segpruner", "tokens": 8, "space": 0.0, "important": 0.0}
    nowhere = {"points": torch.zeros(1, 30, 3), "points_known": torch.zeros(1, 30, dtype=torch.bool)}
    run = choosing(audio(), 0, segpruner(8, 0.0, 0.0))
    compare(audio(), feeds, step, lambda sample: run({**sample, **nowhere}))


def test_all_important_is_topk() -> None:
    feeds = {"frames": frames(2, 30), **places(2, 30)}
    program = program_of(audio(), {"frames": frames(2, 30)})
    score = {"kind": "attention_received"}
    steps = [
        {"preset": "segpruner", "tokens": 8, "important": 1.0},
        {"node": "prune", "at": {"site": "encoder_output"}, "score": score, "budget": {"tokens": 8}},
    ]
    plans = [run_eager(program, policy(step), feeds)[1] for step in steps]
    assert torch.equal(plans[0].made[0].index, plans[1].made[0].index)


def test_padding_is_refused() -> None:
    feeds = sentences([20, 12])
    with pytest.raises(AxisError, match="without padding"):
        run_eager(program_of(text(), feeds), policy({"preset": "segpruner", "tokens": 5}), feeds)
