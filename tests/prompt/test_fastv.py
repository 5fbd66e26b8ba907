"""FastV against its formula: the last row of one layer's attention, mean over heads; the rest of the image is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.prompt.engine import TOKENS, compare, visual_policy
from tests.prompt.oracle import Cut, Rule, Seen
from tests.prompt.rules import keep
from tokcc.passes.methods import library


def rule(kept: int) -> Rule:
    def cut(seen: Seen) -> list[int]:
        return keep(seen, seen.probs[seen.layer][:, -1].mean(0), kept)

    return cut


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_equals_the_formula(family: str, tmp_path: Path) -> None:
    compare(family, visual_policy({"preset": "fastv"}), lambda: [Cut(1, rule(TOKENS // 2))], tmp_path, steps=64)


@pytest.mark.slow
def test_a_number_of_tokens(tmp_path: Path) -> None:
    step = {"preset": "fastv", "layer": 0, "budget": {"tokens": 3}}
    compare("llama", visual_policy(step), lambda: [Cut(0, rule(3))], tmp_path)


@pytest.mark.slow
def test_counted_anew(tmp_path: Path) -> None:
    step = {"preset": "fastv", "positions": "compact"}
    compare("llama", visual_policy(step), lambda: [Cut(1, rule(TOKENS // 2))], tmp_path, compact=True)


def test_the_published_numbers() -> None:
    params = library()["fastv"].params
    assert (params["layer"].default, params["keep"].default) == (1, 0.5)  # K = 2, R = 0.5
