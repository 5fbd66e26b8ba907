"""ToDRE's second stage: no token of the image is left."""

from __future__ import annotations

from pathlib import Path

from tests.prompt.engine import compare, visual_policy
from tests.prompt.models import IMAGE
from tests.prompt.oracle import Cut, Seen


def text_alone(seen: Seen) -> list[int]:
    return [j for j in seen.alive if int(seen.ids[j]) != IMAGE]


def test_equals_the_rule(tmp_path: Path) -> None:
    compare("llama", visual_policy({"preset": "todre-llm", "layers": [2]}), lambda: [Cut(2, text_alone)], tmp_path)
