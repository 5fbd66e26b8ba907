"""LazyLLM's prompt side against its formula; padding goes first."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.prompt.engine import PROMPT, compare, policy
from tests.prompt.oracle import Cut, Rule, Seen
from tests.prompt.rules import best

SHARES = {1: 0.7, 2: 0.5, 3: 0.3}


def rule(share: float) -> Rule:
    def cut(seen: Seen) -> list[int]:
        row = seen.probs[seen.layer][:, -1].mean(0)
        # Rows of a batch have one number of slots, that of the longest; what padding leaves free, tokens keep.
        room = math.ceil(share * (PROMPT - 1) - 1e-9)
        return [*best(row, seen.alive[:-1], room), seen.alive[-1]]

    return cut


def lengths(prompt: int) -> list[int]:
    found = [prompt, prompt]
    return [*found, *(math.ceil(share * (prompt - 1) - 1e-9) + 1 for share in SHARES.values())]


@pytest.mark.parametrize("positions", ["keep", pytest.param("compact", marks=pytest.mark.slow)])
def test_equals_the_formula(positions: str, tmp_path: Path) -> None:
    cuts = [Cut(layer, rule(share)) for layer, share in SHARES.items()]
    wanted = policy([{"preset": "lazyllm-prefill", "positions": positions}])
    compare("llama", wanted, lambda: cuts, tmp_path, lengths=lengths, compact=positions == "compact")
