"""CoreMatching's part about tokens: neurons shared with the fifth token from the end."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.prompt.engine import compare, visual_policy
from tests.prompt.oracle import Cut, Rule, Seen
from tests.prompt.rules import keep


def rule(kept: int) -> Rule:
    def cut(seen: Seen) -> list[int]:
        active = seen.activations[seen.layer] > 0
        core = {n for n in range(active.shape[1]) if active[-5, n]}
        counts = [sum(bool(active[j, n]) for n in core) for j in range(len(active))]
        return keep(seen, torch.tensor(counts), kept)

    return cut


def test_equals_the_formula(tmp_path: Path) -> None:
    step = {"preset": "corematching", "layer": 1, "keep": 0.3}
    compare("llama", visual_policy(step), lambda: [Cut(1, rule(5))], tmp_path)
