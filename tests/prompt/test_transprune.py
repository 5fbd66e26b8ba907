"""TransPrune against its formula: how modules change tokens, added up over layers, and the text's attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.prompt.engine import TOKENS, compare, visual_policy
from tests.prompt.models import IMAGE
from tests.prompt.oracle import Cut, Rule, Seen
from tests.prompt.rules import attended, behind, keep

LAYERS, KEPT = (1, 2, 3), (0.875, 0.625, 0.25)


def rule(share: float, first: int, text: bool) -> Rule:
    def cut(seen: Seen) -> list[int]:
        total = seen.memory.setdefault("total", torch.zeros(len(seen.ids)))
        start = max(first, seen.memory.get("next", 0))
        seen.memory["next"] = seen.layer + 1
        for layer in range(start, seen.layer + 1):
            for kind in ("attention", "mlp"):
                given, made = seen.branches[layer, kind]
                moved = {j: float(torch.exp(1 - torch.cosine_similarity(given[j], made[j], dim=0))) for j in seen.alive}
                for j in seen.alive:
                    total[j] += made[j].norm() / given[j].norm() * moved[j] / sum(moved.values())
        image = seen.visual(IMAGE)
        score = total / total[image].sum()
        if text:
            table = attended(seen, behind(seen), seen.alive).mean(0).mean(0)
            score = score + table / table[image].sum()
        return keep(seen, score if text else total, int(-(-share * TOKENS // 1)))

    return cut


@pytest.mark.parametrize("text", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_equals_the_formula(text: bool, tmp_path: Path) -> None:
    step = {"preset": "transprune", "layers": list(LAYERS), "keep": list(KEPT), "first": 1, "text": text}
    compare(
        "llama",
        visual_policy(step),
        lambda: [Cut(layer, rule(share, 1, text)) for layer, share in zip(LAYERS, KEPT, strict=True)],
        tmp_path,
        compact=True,
    )
