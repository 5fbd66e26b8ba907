"""LTM's merging mask in its plain form (arXiv:2407.15219; the composition is ours), with random weights in a file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.passes.oracle import Cut, Feeds, Method, Result, Scene, compare, policy, program_of, reference
from tests.passes.reference_models import WIDTH, patches, vision
from tokcc.testing import reduce_program, run_eager

LAYERS = (1, 2, 3)
TOKENS = (30, 23, 18)


@pytest.fixture
def weights(tmp_path: Path) -> tuple[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    tensors: dict[str, Tensor] = {}
    for i, count in enumerate(TOKENS):
        tensors[f"stages.{i}.layers.0.weight"] = torch.randn(count, WIDTH, generator=generator) / 3
        tensors[f"stages.{i}.layers.0.bias"] = torch.randn(count, generator=generator)
    save_file(tensors, tmp_path / "masks.safetensors")
    return str(tmp_path / "masks.safetensors"), tensors


def mask(x: Tensor, stage: int, tensors: dict[str, Tensor], gate: str) -> list[list[float]]:
    logits = x @ tensors[f"stages.{stage}.layers.0.weight"].T + tensors[f"stages.{stage}.layers.0.bias"]
    rows = []
    for column in logits.T.tolist():
        parts = [math.exp(v) if gate == "softmax" else 1 / (1 + math.exp(-v)) for v in column]
        rows.append([part / sum(parts) for part in parts])
    return rows


def ltm(tensors: dict[str, Tensor], gate: str) -> Method:
    def method(scene: Scene) -> Cut | None:
        rows = mask(scene.x[1:], LAYERS.index(scene.layer), tensors, gate)
        merged = [sum((w * scene.x[1 + j] for j, w in enumerate(row)), torch.zeros(WIDTH)) for row in rows]
        return Cut([0] + [-1] * len(rows), torch.stack([scene.x[0], *merged]))

    return method


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_images(weights: tuple[str, dict[str, Tensor]], gate: str) -> None:
    """40 patches at 0.75: ceil(30), ceil(22.5), ceil(17.25)."""

    def oracle(sample: Feeds) -> Result:
        return reference(vision(), sample, ltm(weights[1], gate), layers=LAYERS, at_end=True)

    step = {"preset": "ltm", "weights": weights[0], "gate": gate}
    results = compare(vision(), {"patches": patches(3, 41)}, step, oracle, engine=True)
    assert results[0].lengths == [31, 24, 19]


@torch.no_grad()
def test_each_patch_goes_where_it_weighs_most(weights: tuple[str, dict[str, Tensor]]) -> None:
    """What the map of a reduced output says, where one token is part of all."""
    feeds = {"patches": patches(2, 41)}
    seen: list[Scene] = []

    def spy(scene: Scene) -> Cut | None:
        seen.append(scene)
        return None

    reference(vision(), {"patches": feeds["patches"][1:]}, spy, layers=(1,), at_end=True)
    one = Path(weights[0]).parent / "one.safetensors"
    save_file({name: t for name, t in weights[1].items() if name.startswith("stages.0.")}, one)
    step = {"preset": "ltm", "weights": str(one), "at": {"layers": [1]}, "budget": {"tokens": 30}}
    outputs, _ = run_eager(program_of(vision(), feeds), policy(step), feeds)
    rows = mask(seen[0].x[1:], 0, weights[1], "softmax")
    best = [max(range(len(rows)), key=lambda k: rows[k][j]) for j in range(40)]
    assert outputs[2][1].tolist() == [0, *(1 + k for k in best)]
    reduced, _ = reduce_program(program_of(vision(), feeds), policy(step))
    assert reduced.output_names[-1] == "tokens.token_assign"
