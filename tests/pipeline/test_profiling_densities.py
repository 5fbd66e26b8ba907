"""How evenly layers rate blocks: against loops, and as a policy reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.decoders.bundles import compiled, model_folder
from tokcc.analysis.head_numbers import Heard
from tokcc.pipeline import profile
from tokcc.pipeline import profiling_densities as densities
from tokcc.pipeline.profiling_densities import DensitySums

LENGTH, BLOCK = 45, 4


def heard(layer: int, seed: int, sharp: float) -> Heard:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(heads, LENGTH, 6, generator=generator) for heads in (4, 2))
    query += sharp * key.repeat_interleave(2, 0)[:, 5:6]
    return Heard(layer, query, key, key, 0, 1.0, 0.0)


def density(given: Heard) -> list[float]:
    """Of single queries of the second half about the blocks of the first."""
    query, key, half = given.query.double().numpy(), given.key.double().numpy(), LENGTH // 2
    vectors = []
    for start in range(0, half // BLOCK * BLOCK, BLOCK):
        vector = []
        for head in range(2):
            shared = query[2 * head : 2 * head + 2].sum(0)
            got = [sum(shared[j] @ key[head, i] for j in range(i + 1, min(i + half, LENGTH - 1) + 1))
                   for i in range(start, start + BLOCK)]  # fmt: skip
            best = np.argsort(got)[::-1][:3]
            vector += [key[head, start + best].mean(0)] * 2
        vectors.append(np.concatenate(vector))
    found = []
    for row in np.round(np.linspace(half, LENGTH - 1, 32 if LENGTH - half > 32 else LENGTH - half)).astype(int):
        own = query[:, row].flatten()
        rated = np.array([own @ v / np.linalg.norm(own) / np.linalg.norm(v) for v in vectors])
        share = np.exp(rated) / np.exp(rated).sum()
        found.append(float(-(share * np.log(share)).sum() / np.log(len(vectors))))
    return found


def test_the_entropy_of_the_ratings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(densities, "REPRESENTATIVES", 3)
    texts = [heard(0, 0, 0.0), heard(1, 1, 2.0), heard(0, 2, 1.0), heard(1, 3, 3.0)]
    made = DensitySums(2 * BLOCK)
    for given in texts:
        made.hear(given)
    wanted = [np.mean([density(texts[i]), density(texts[i + 2])]) for i in (0, 1)]
    np.testing.assert_allclose(made.found(), wanted, rtol=1e-5)
    assert max(made.found()) < 1
    assert abs(made.found()[1] - made.found()[0]) > 1e-3


@pytest.mark.slow
def test_a_profile_serves_the_preset(tmp_path: Path) -> None:
    folder, path = model_folder(tmp_path / "model"), tmp_path / "heads.json"
    made = profile(folder, tokens=64)
    assert made.densities is not None
    assert len(made.densities) == 3
    made.save(path)
    step = {"preset": "actqkv", "profile": str(path), "tokens": 8, "block": 4, "window": 4, "sinks": 1, "local": 1,
            "near": 4, "least": 1, "length": 0}  # fmt: skip
    bundle = compiled(folder, tmp_path / "bundle", {"version": 1, "name": "a", "steps": [step]})
    lock = (bundle.path / "policy.lock.yaml").read_text()
    assert str(path) not in lock
    assert "densities" in lock
