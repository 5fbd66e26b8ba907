"""PromptDistill against its formula: pooled scaled products of the last query, in front of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.prompt.engine import compare, policy
from tests.prompt.oracle import Cut, Rule, Seen
from tests.prompt.rules import best


def rule(kept: int, pool: int) -> Rule:
    def cut(seen: Seen) -> list[int]:
        module = seen.model.model.layers[seen.layer]
        given, width = seen.branches[seen.layer, "attention"][0], module.self_attn.head_dim
        cos, sin = seen.turned  # positions are kept: those of the next layer are those of this one
        turned = []
        for projection in (module.self_attn.q_proj, module.self_attn.k_proj):
            with torch.no_grad():
                x = projection(given).unflatten(-1, (-1, width)).transpose(0, 1)
            turned.append(x * cos + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * sin)
        query, key = turned[0], turned[1].repeat_interleave(len(turned[0]) // len(turned[1]), 0)
        row = (query[:, -1:] * key).sum(-1).mean(0) / width**0.5
        values = [0.0 if j == seen.alive[-1] else float(row[j]) for j in seen.alive]
        side = pool // 2
        padded = [0.0] * side + values + [0.0] * side
        pooled = torch.zeros(len(seen.ids))
        for place, j in enumerate(seen.alive):
            pooled[j] = sum(padded[place : place + pool]) / pool
        return [*best(pooled, seen.alive[:-1], kept), seen.alive[-1]]

    return cut


@pytest.mark.parametrize("pool", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_equals_the_formula(pool: int, tmp_path: Path) -> None:
    step = {"preset": "promptdistill", "layers": [1, 3], "tokens": [20, 9], "pool": pool}
    cuts = [Cut(1, rule(20, pool)), Cut(3, rule(9, pool))]
    compare("llama", policy([step]), lambda: cuts, tmp_path)


@pytest.mark.slow
def test_a_number_that_does_not_bind(tmp_path: Path) -> None:
    step = {"preset": "promptdistill", "layers": [1], "tokens": [200]}
    compare("llama", policy([step]), lambda: [Cut(1, lambda seen: seen.alive)], tmp_path, steps=3)
