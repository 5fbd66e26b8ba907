"""The threshold of each head: halved until a head's output is near enough, against loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.decoders.bundles import compiled, model_folder
from tests.sparse.methods import test_sale as sale
from tokcc.analysis.head_numbers import Heard
from tokcc.pipeline import profile
from tokcc.pipeline import profiling_thresholds as search
from tokcc.pipeline.profiling_thresholds import ThresholdSearch


def heard(seed: int, sharp: float) -> Heard:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(heads, 45, 8, generator=generator) for heads in (4, 2, 2))
    strength = torch.tensor([0.3, 1.0, 2.0, 4.0])[:, None, None]
    return Heard(0, sharp * strength * query, key, 3 * value, 0, 8**-0.5, 0.0)


def cost(given: Heard, head: int, threshold: float) -> float:
    """What a threshold changes of one head's output, summed over queries and channels."""
    query, key, value = (x.double().numpy() for x in (given.query[head], given.key[head // 2], given.value[head // 2]))
    table, total = sale.ratios(query, key, given.scale, 4), 0.0
    for i in range(45):
        weights = np.exp(key[: i + 1] @ query[i] * given.scale)
        row = i // sale.QUERIES
        read = [table[row, j // sale.KEYS] > threshold or j // sale.KEYS in sale.must_read(row, 45, 45)
                for j in range(i + 1)]  # fmt: skip
        less = weights * read
        total += np.abs(weights @ value[: i + 1] / weights.sum() - less @ value[: i + 1] / less.sum()).sum()
    return total


def test_thresholds_are_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "NEAR", sale.NEAR)
    monkeypatch.setattr(search, "FIRST", 0.2)
    monkeypatch.setattr(search, "LEAST", 0.02)
    texts = [heard(0, 1.0), heard(1, 1.5)]
    found = ThresholdSearch(sale.QUERIES)
    for given in texts:
        found.hear(given)
    assert found.thresholds == (0.2, 0.1, 0.05, 0.025)
    costs = [
        [sum(cost(text, head, threshold) for text in texts) for head in range(4)] for threshold in found.thresholds
    ]
    np.testing.assert_allclose(found.errors[0], costs, rtol=1e-3, atol=1e-4)
    wanted = []
    for head in range(4):
        threshold = 0.2
        while threshold >= 0.02 and sum(cost(text, head, threshold) for text in texts) >= 0.4 * 90:
            threshold /= 2
        wanted.append(threshold if threshold >= 0.02 else 0.0)
    assert list(found.found()[0]) == wanted
    assert len(set(wanted)) > 1


def test_the_published_numbers() -> None:
    assert ThresholdSearch(64).thresholds == (0.008, 0.004, 0.002, 0.001, 0.0005, 0.00025, 0.000125)


@pytest.mark.slow
def test_a_profile_with_a_text_serves_the_preset(tmp_path: Path) -> None:
    folder, path = model_folder(tmp_path / "model"), tmp_path / "heads.json"
    made = profile(folder, tokens=64, block=8, data=np.random.default_rng(0).integers(3, 97, 200))
    assert made.thresholds is not None
    assert [len(row) for row in made.thresholds] == [4, 4, 4]
    made.save(path)
    step = {"preset": "sale", "profile": str(path), "block": 8, "key_block": 4, "length": 0}
    bundle = compiled(folder, tmp_path / "bundle", {"version": 1, "name": "s", "steps": [step]})
    lock = (bundle.path / "policy.lock.yaml").read_text()
    assert str(path) not in lock
    assert "thresholds" in lock or "heads" in lock
