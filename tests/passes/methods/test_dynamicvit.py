"""DynamicViT against a brute-force reading of arXiv:2106.02034, with random weights of the predictors in a file."""

from __future__ import annotations

from fractions import Fraction
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
    drop,
    of_stage,
    policy,
    program_of,
    reference,
    top,
)
from tests.passes.reference_models import WIDTH, patches, sentences, text, vision
from tokcc.config import load_policy
from tokcc.errors import PolicyError
from tokcc.passes.methods import library
from tokcc.testing import plan_for, reduce_program, run_program

LAYERS = (0, 1, 2)


def predictors(stages: int = 3, embedded: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    widths = [embedded, 8, 6, 2]
    made: dict[str, Tensor] = {}
    for i in range(stages):
        made[f"stages.{i}.norm.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=generator)
        made[f"stages.{i}.norm.bias"] = 0.1 * torch.randn(WIDTH, generator=generator)
        made[f"stages.{i}.embed.weight"] = torch.randn(embedded, WIDTH, generator=generator) / WIDTH**0.5
        made[f"stages.{i}.embed.bias"] = 0.1 * torch.randn(embedded, generator=generator)
        for place in range(3):
            shape = (widths[place + 1], widths[place])
            made[f"stages.{i}.layers.{place}.weight"] = torch.randn(shape, generator=generator)
            made[f"stages.{i}.layers.{place}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return made


@pytest.fixture
def weights(tmp_path: Path) -> tuple[str, dict[str, Tensor]]:
    tensors = predictors()
    save_file(tensors, tmp_path / "predictors.safetensors")
    return str(tmp_path / "predictors.safetensors"), tensors


def keep_score(x: Tensor, stage: int, tensors: dict[str, Tensor]) -> Tensor:
    """``log_softmax(...)[:, 0]`` of the patches ``[M, C]``."""
    own = of_stage(tensors, stage)
    normed = F.layer_norm(x, (WIDTH,), own["norm.weight"], own["norm.bias"])
    z = F.gelu(F.linear(normed, own["embed.weight"], own["embed.bias"]))
    half = z.shape[1] // 2
    y = torch.cat([z[:, :half], z[:, half:].mean(0, keepdim=True).expand(len(z), -1)], dim=1)
    for place in range(3):
        y = F.linear(F.gelu(y) if place else y, own[f"layers.{place}.weight"], own[f"layers.{place}.bias"])
    return F.log_softmax(y, dim=1)[:, 0]


def dynamicvit(keep: str, tensors: dict[str, Tensor]) -> Method:
    def method(scene: Scene) -> Cut | None:
        stage = LAYERS.index(scene.layer)
        score = [0.0, *keep_score(scene.x[1:], stage, tensors).tolist()]
        wanted = max(1, min(int((scene.initial - 1) * Fraction(keep) ** (stage + 1)), scene.n - 1))
        return drop(scene, [0, *sorted(top(score, range(1, scene.n), wanted))])

    return method


def check(model: Model, feeds: Feeds, keep: str, weights: tuple[str, dict[str, Tensor]], **kwargs: Any) -> list[Result]:
    step = {"preset": "dynamicvit", "weights": weights[0], "keep": float(keep), "at": {"layers": list(LAYERS)}}

    def oracle(sample: Feeds) -> Result:
        return reference(model, sample, dynamicvit(keep, weights[1]), layers=LAYERS, at_end=True)

    return compare(model, feeds, step, oracle, **kwargs)


def test_images(weights: tuple[str, dict[str, Tensor]]) -> None:
    results = check(vision(), {"patches": patches(3, 50)}, "0.7", weights, full=True, engine=True)
    assert results[0].lengths == [35, 25, 17]  # int(49 * 0.7), int(49 * 0.49), int(49 * 0.343)


def test_padded_rows_are_what_they_are_alone(weights: tuple[str, dict[str, Tensor]]) -> None:
    check(text(), sentences([20, 14, 6]), "0.6", weights)


def test_dynamic_batch_and_resolution(weights: tuple[str, dict[str, Tensor]]) -> None:
    shapes = {"patches": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=4, max=100)}}
    feeds = {"patches": patches(3, 38)}
    check(vision(), feeds, "0.7", weights, engine=True, dynamic=shapes, traced={"patches": patches(2, 26)})


def test_everything_kept_is_the_model(weights: tuple[str, dict[str, Tensor]]) -> None:
    feeds = {"patches": patches(2, 30)}
    step = {"preset": "dynamicvit", "weights": weights[0], "keep": 1.0, "at": {"layers": list(LAYERS)}}
    reduced, plan = reduce_program(program_of(vision(), feeds), policy(step))
    assert plan.reductions == ()
    with torch.no_grad():
        assert torch.equal(run_program(reduced, feeds)[1], vision()(**feeds)["pooled"])


def test_predictors_of_fewer_stages_are_refused(tmp_path: Path) -> None:
    save_file(predictors(stages=2), tmp_path / "two.safetensors")
    step = {"preset": "dynamicvit", "weights": str(tmp_path / "two.safetensors"), "at": {"layers": list(LAYERS)}}
    with pytest.raises(PolicyError, match=r"no tensor `stages\.2\.norm\.weight`"):
        plan_for(program_of(vision(), {"patches": patches(2, 20)}), policy(step))


def test_defaults() -> None:
    (step,) = load_policy("dynamicvit", presets=library()).policy.steps
    assert step.at.resolve(12) == (2, 5, 8)  # in front of blocks 3, 6 and 9
