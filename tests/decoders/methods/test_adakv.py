"""Ada-KV: the heads of a layer share its budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.decoders.engine import build, tokens
from tests.decoders.masked import Seen, assert_equals_masked
from tests.decoders.methods.test_snapkv import smoothed
from tokcc.errors import TokccError


def policy(**given: object) -> dict[str, object]:
    return {"version": 1, "name": "adakv", "steps": [{"preset": "adakv", **given}]}


def rule(capacity: int, window: int, kernel: int, floor: float, widest: float) -> object:
    """Window scores, pooled over heads; only what is still there counts."""

    def evict(seen: Seen) -> None:
        if seen.new == 1:
            return
        heads, total = seen.weight.shape
        base = capacity - window
        rows = range(max(0, seen.new - window), seen.new)
        scores = []
        for head in range(heads):
            alive = [j for j in range(total) if seen.weight[head, j] > 0]
            row = [
                sum(float(probs[i, j]) for probs in seen.grouped[head] for i in rows) / seen.grouped.shape[1]
                for j in alive
            ]
            row[-window:] = [0.0] * window
            scores.append(dict(zip(alive[:-window], smoothed(row, kernel, "max"), strict=False)))
        every = sorted(((-s, head, j) for head in range(heads) for j, s in scores[head].items()))
        counts = [sum(head == g for _, head, _ in every[: heads * base]) for g in range(heads)]
        for head in range(heads):
            most = round(counts[head] * (1 - floor)) + int(floor * base)
            most = min(most, int(widest * capacity) - window)
            best = sorted(scores[head], key=lambda j: (-scores[head][j], j))[:most]
            for j in scores[head]:
                if j not in best:
                    seen.weight[head, j] = 0

    return evict


@pytest.mark.parametrize(("family", "floor"), [("llama", 0.2), ("qwen2", 0.0), ("gpt-neox", 0.5)])
def test_equals_the_formula(family: str, floor: float, tmp_path: Path) -> None:
    """One prompt: rows that were filled up are not smoothed as if they were apart."""
    given = policy(tokens=9, window=4, kernel=3, floor=floor, widest=1.5)
    calls = (21, *[1] * 64)
    _, last = assert_equals_masked(family, given, rule(9, 4, 3, floor, 1.5), tmp_path, calls=calls)
    assert last["present.0.key"].shape[2] == 13 + 64
    weight = last["present.0.key_weight"][..., 0]  # [B, Hkv, K]
    counts = weight.sum(2) - 64
    assert counts.min() >= 4
    assert len(set(counts.reshape(-1).tolist())) > 1  # heads do differ


def test_a_floor_of_everything_is_snapkv(tmp_path: Path) -> None:
    ids, mask = tokens(3, 60, (0, 2, 5))
    calls = (30, *[1] * 30)
    given = {"tokens": 12, "window": 5, "kernel": 3}
    one = build("llama", policy(**given, floor=1.0), tmp_path).run(ids, mask, calls)[0]
    plain = {"version": 1, "name": "s", "steps": [{"preset": "snapkv", **given}]}
    two = build("llama", plain, tmp_path).run(ids, mask, calls)[0]
    torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(two), atol=1e-4, rtol=1e-4)


def test_a_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokccError, match="fixed capacity"):
        build("llama", policy(budget={"keep": 0.5}), tmp_path)
