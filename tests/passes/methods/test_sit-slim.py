"""The token slimming module of SiT against a brute force of arXiv:2111.12624, with random weights in a file."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.export import Dim

from tests.passes.oracle import (
    Cut,
    Feeds,
    Method,
    Model,
    Result,
    Scene,
    compare,
    of_stage,
    policy,
    program_of,
    reference,
)
from tests.passes.reference_models import WIDTH, patches, sentences, text, vision
from tokcc.config import load_policy
from tokcc.errors import AxisError
from tokcc.passes.methods import library
from tokcc.testing import reduce_program, run_program, trace

LAYERS = (0, 2)
TOKENS = (24, 12)


def modules(tokens: tuple[int, ...] = TOKENS, hidden: int = 10) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    made: dict[str, Tensor] = {}
    for i, count in enumerate(tokens):
        made[f"stages.{i}.norm.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=generator)
        made[f"stages.{i}.norm.bias"] = 0.1 * torch.randn(WIDTH, generator=generator)
        made[f"stages.{i}.layers.0.weight"] = torch.randn(hidden, WIDTH, generator=generator) / 4
        made[f"stages.{i}.layers.0.bias"] = 0.1 * torch.randn(hidden, generator=generator)
        made[f"stages.{i}.layers.1.weight"] = torch.randn(count, hidden, generator=generator)
        made[f"stages.{i}.layers.1.bias"] = 0.1 * torch.randn(count, generator=generator)
        made[f"stages.{i}.scale"] = torch.tensor([1.3])
    return made


@pytest.fixture
def weights(tmp_path: Path) -> tuple[str, dict[str, Tensor]]:
    tensors = modules()
    save_file(tensors, tmp_path / "slim.safetensors")
    return str(tmp_path / "slim.safetensors"), tensors


def columns(x: Tensor, stage: int, tensors: dict[str, Tensor]) -> list[list[float]]:
    """``G``: for every new token the share of each patch, summing to one over patches."""
    own = of_stage(tensors, stage)
    z = F.layer_norm(x, (WIDTH,), own["norm.weight"], own["norm.bias"])
    z = F.gelu(z @ own["layers.0.weight"].T + own["layers.0.bias"]) @ own["layers.1.weight"].T + own["layers.1.bias"]
    found = []
    for column in (z * own["scale"]).T.tolist():
        parts = [math.exp(value - max(column)) for value in column]
        found.append([part / sum(parts) for part in parts])
    return found


def sit(tensors: dict[str, Tensor]) -> Method:
    def method(scene: Scene) -> Cut | None:
        new = [scene.x[0]]
        kept = [0]
        for shares in columns(scene.x[1:], LAYERS.index(scene.layer), tensors):
            assert sum(shares) == pytest.approx(1, abs=1e-5)
            new.append(sum((share * scene.x[1 + j] for j, share in enumerate(shares)), torch.zeros(WIDTH)))
            kept.append(-1)
        return Cut(kept, torch.stack(new))

    return method


def step_of(path: str, **more: Any) -> dict[str, Any]:
    return {"preset": "sit-slim", "weights": path, "at": {"layers": list(LAYERS)}, **more}


def check(
    model: Model, feeds: Feeds, weights: tuple[str, dict[str, Tensor]], step: dict[str, Any], **kw: Any
) -> list[Result]:
    def oracle(sample: Feeds) -> Result:
        return reference(model, sample, sit(weights[1]), layers=LAYERS, at_end=True)

    return compare(model, feeds, step, oracle, **kw)


def test_images(weights: tuple[str, dict[str, Tensor]]) -> None:
    """49 patches at a share of 0.5: int(24.5), int(12.25)."""
    results = check(vision(), {"patches": patches(3, 50)}, weights, step_of(weights[0]), engine=True)
    assert results[0].lengths == [25, 13]


def test_padding_has_no_share(weights: tuple[str, dict[str, Tensor]]) -> None:
    budget = {"schedule": list(TOKENS)}
    check(text(), sentences([30, 27, 26]), weights, step_of(weights[0], budget=budget))


def test_dynamic_batch(weights: tuple[str, dict[str, Tensor]]) -> None:
    shapes = {"patches": {0: Dim("batch", min=1, max=9)}}
    feeds = {"patches": patches(3, 50)}
    check(
        vision(), feeds, weights, step_of(weights[0]), engine=True, dynamic=shapes, traced={"patches": patches(2, 50)}
    )


@torch.no_grad()
def test_equal_patches_stay_what_they_are(tmp_path: Path) -> None:
    """A convex combination of equal tokens; the class token sees the same keys."""
    save_file(modules((5,)), tmp_path / "one.safetensors")
    feeds = {"patches": patches(2, 2).expand(-1, 12, -1).contiguous()}
    step = step_of(str(tmp_path / "one.safetensors"), at={"layers": [3]}, budget={"tokens": 5})
    model = copy.deepcopy(vision())
    model.positions.data.zero_()
    reduced = run_program(reduce_program(trace(model, feeds), policy(step))[0], feeds)[0]
    dense = model(**feeds)["tokens"]
    torch.testing.assert_close(reduced[:, 1:], dense[:, 1:2].expand(-1, 5, -1), rtol=0, atol=1e-4)


def test_a_budget_that_the_weights_do_not_make_is_refused(weights: tuple[str, dict[str, Tensor]]) -> None:
    feeds = {"patches": patches(2, 50)}
    with pytest.raises(AxisError, match="the weights make 24 tokens here, and the budget asks for 19"):
        reduce_program(program_of(vision(), feeds), policy(step_of(weights[0], keep=0.4)))


def test_defaults() -> None:
    (step,) = load_policy("sit-slim", presets=library()).policy.steps
    assert step.at.resolve(16) == (8, 11, 13)  # behind stages of 9, 3, 2 and 2 blocks
