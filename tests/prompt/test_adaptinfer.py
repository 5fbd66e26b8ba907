"""AdaptInfer against its formula, head by head in loops."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.prompt.engine import compare, visual_policy
from tests.prompt.oracle import Cut, Rule, Seen
from tests.prompt.rules import behind, keep

LAYERS, KEPT = (0, 1, 2), (10, 6, 3)


def rule(kept: int) -> Rule:
    def cut(seen: Seen) -> list[int]:
        probs, text = seen.probs[seen.layer].double(), behind(seen)
        scores = torch.zeros(len(seen.ids), dtype=torch.float64)
        for head in probs:
            among = head[text][:, text]
            both = among + among.T - torch.diag(torch.diag(among))
            for t, weight in zip(text, both.sum(0), strict=True):
                scores += weight * head[t]
        return keep(seen, scores, kept)

    return cut


def test_equals_the_formula(tmp_path: Path) -> None:
    step = {"preset": "adaptinfer", "layers": list(LAYERS), "tokens": list(KEPT)}
    cuts = [Cut(layer, rule(kept)) for layer, kept in zip(LAYERS, KEPT, strict=True)]
    compare("llama", visual_policy(step), lambda: cuts, tmp_path, compact=True)
