"""PYRA against a brute-force reading of arXiv:2403.09192, with random gates in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.passes.oracle import (
    Cut,
    Feeds,
    Method,
    Result,
    Scene,
    compare,
    cosine,
    of_stage,
    policy,
    program_of,
    reference,
)
from tests.passes.reference_models import WIDTH, patches, sentences, text, vision
from tokcc.errors import AxisError
from tokcc.testing import reduce_program, run_program

PAIRS = (9, 9, 9, 9)


def gates(pairs: tuple[int, ...] = PAIRS, token: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    made: dict[str, Tensor] = {}
    for i, count in enumerate(pairs):
        made[f"stages.{i}.channel"] = torch.randn(count, generator=generator)
        made[f"stages.{i}.token"] = token * torch.randn(WIDTH, generator=generator) / 4
        made[f"stages.{i}.norm.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=generator)
        made[f"stages.{i}.norm.bias"] = 0.1 * torch.randn(WIDTH, generator=generator)
    return made


def saved(folder: Path, **options: Any) -> tuple[str, dict[str, Tensor]]:
    tensors = gates(**options)
    save_file(tensors, folder / "gates.safetensors")
    return str(folder / "gates.safetensors"), tensors


def pyra(r: int, tensors: dict[str, Tensor]) -> Method:
    def method(scene: Scene) -> Cut | None:
        own = of_stage(tensors, scene.layer)
        key = [sum(scene.keys[h, i] for h in range(len(scene.keys))) for i in range(scene.n)]
        evens, odds = range(2, scene.n, 2), range(1, scene.n, 2)
        to = {a: max(odds, key=lambda b: (cosine(key[a], key[b]), -b)) for a in evens}
        edges = sorted(evens, key=lambda a: (-cosine(key[a], key[to[a]]), a))[:r]
        u = torch.stack([scene.sizes[a] * scene.x[a] for a in edges])
        w = torch.stack([scene.sizes[to[a]] * scene.x[to[a]] for a in edges])
        z = F.layer_norm(u + w, (WIDTH,), own["norm.weight"], own["norm.bias"])
        channel = 2 * torch.sigmoid(own["channel"] @ z)
        token = 2 * torch.sigmoid(z @ own["token"]) - 1
        u = u + (u * channel) * token[:, None]
        kept = [0, *(a for a in evens if a not in edges), *odds]
        total, size = {i: scene.sizes[i] * scene.x[i] for i in kept}, {i: float(scene.sizes[i]) for i in kept}
        for row, a in enumerate(edges):
            total[to[a]] = total[to[a]] + u[row]
            size[to[a]] += float(scene.sizes[a])
        x = torch.stack([total[i] / size[i] for i in kept])
        return Cut(kept, x, [(a, to[a]) for a in edges], torch.tensor([size[i] for i in kept]))

    return method


def test_images(tmp_path: Path) -> None:
    path, tensors = saved(tmp_path)

    def oracle(sample: Feeds) -> Result:
        return reference(vision(), sample, pyra(9, tensors), layers=range(4))

    step = {"preset": "pyra", "weights": path, "r": 9}
    results = compare(vision(), {"patches": patches(3, 50)}, step, oracle, engine=True)
    assert results[0].lengths == [41, 32, 23, 14]


def test_token_gates_of_zero_are_tome(tmp_path: Path) -> None:
    """Where training starts from, to the last bit."""
    path, _ = saved(tmp_path, token=0.0)
    feeds = {"patches": patches(3, 50)}
    found = []
    for step in ({"preset": "pyra", "weights": path, "r": 9}, {"preset": "tome", "r": 9}):
        reduced, _ = reduce_program(program_of(vision(), feeds), policy(step))
        found.append(run_program(reduced, feeds))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_another_number_of_pairs_than_trained_is_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, pairs=(9, 9, 9, 8))
    step = {"preset": "pyra", "weights": path, "r": 9}
    with pytest.raises(AxisError, match="the weights are for 8 pairs here, and 9 merge"):
        reduce_program(program_of(vision(), {"patches": patches(2, 50)}), policy(step))


def test_padded_batches_are_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    step = {"preset": "pyra", "weights": path, "r": 9}
    with pytest.raises(AxisError, match="samples differ in theirs"):
        reduce_program(program_of(text(), sentences([30, 20])), policy(step))
