"""Our composition of AdaToken-3D: the text's attention."""

from __future__ import annotations

import math
from pathlib import Path

from tests.prompt.engine import TOKENS, compare, visual_policy
from tests.prompt.oracle import Cut, Rule, Seen
from tests.prompt.rules import behind, keep


def rule(share: float) -> Rule:
    def cut(seen: Seen) -> list[int]:
        return keep(seen, seen.probs[seen.layer][:, behind(seen)].mean((0, 1)), math.ceil(share * TOKENS - 1e-9))

    return cut


def test_equals_the_formula(tmp_path: Path) -> None:
    shares = {1: 0.7, 2: 0.5, 3: 0.4}  # a quarter, a half and three quarters of five layers
    cuts = [Cut(layer, rule(share)) for layer, share in shares.items()]
    compare("llama", visual_policy({"preset": "adatoken-3d"}), lambda: cuts, tmp_path)
