"""ADSC: evenly spaced tokens of the image, whatever they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.prompt.engine import compare, visual_policy
from tests.prompt.models import IMAGE
from tests.prompt.oracle import Cut, Rule, Seen


def rule(kept: int) -> Rule:
    def cut(seen: Seen) -> list[int]:
        image = seen.visual(IMAGE)
        chosen = {image[i * len(image) // kept] for i in range(kept)}
        return [j for j in seen.alive if int(seen.ids[j]) != IMAGE or j in chosen]

    return cut


def test_equals_the_formula(tmp_path: Path) -> None:
    step = {"preset": "adsc", "layers": [0, 2]}
    engine = compare("llama", visual_policy(step), lambda: [Cut(0, rule(8)), Cut(2, rule(4))], tmp_path)
    read = {str(node.target) for node in engine.program.graph.nodes if "adsc" in node.meta.get("tokcc", "")}
    assert not any("softmax" in name or "matmul" in name for name in read)


@pytest.mark.slow
def test_a_number_that_does_not_divide(tmp_path: Path) -> None:
    step = {"preset": "adsc", "layers": [1], "budget": {"tokens": 7}}
    compare("llama", visual_policy(step), lambda: [Cut(1, rule(7))], tmp_path, steps=2)
