"""How many tokens every layer of a 12-layer ViT with 197 tokens has, against the published schedules.

Those of tome, evit and pitome are in ``tests/passes/test_budget.py``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.passes.oracle import policy, program_of
from tests.passes.reference_models import WIDTH, patches, vision
from tokcc.ir.program import Program
from tokcc.testing import run_eager

TOKENS = 197


@cache
def vit(depth: int) -> Program:
    return program_of(vision(depth), {"patches": patches(1, TOKENS)})


def lengths(step: dict[str, Any], depth: int = 12) -> list[int]:
    """Run the reductions eagerly and read off how many tokens are behind each."""
    _, plan = run_eager(vit(depth), policy(step), {"patches": patches(1, TOKENS)})
    return [int(space.size) for space in plan.made]


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def predictors() -> dict[str, Tensor]:
    made = {}
    for i in range(3):
        made[f"stages.{i}.norm.weight"] = torch.ones(WIDTH)
        made[f"stages.{i}.embed.weight"] = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(i))
        for place, shape in enumerate(((4, 8), (3, 4), (2, 3))):
            made[f"stages.{i}.layers.{place}.weight"] = torch.ones(shape)
    return made


DYNAMICVIT = {0.5: "99 50 25", 0.6: "118 71 43", 0.7: "138 97 68", 0.8: "157 126 101", 0.9: "177 159 143"}


@pytest.mark.parametrize("keep", DYNAMICVIT)
def test_dynamicvit(keep: float, tmp_path: Path) -> None:
    save_file(predictors(), tmp_path / "p.safetensors")
    step = {"preset": "dynamicvit", "keep": keep, "weights": str(tmp_path / "p.safetensors")}
    assert lengths(step) == numbers(DYNAMICVIT[keep])


PYRA = {
    "low": ({"r": 16}, [16] * 11 + [10], "181 165 149 133 117 101 85 69 53 37 21 11"),
    "high": (
        {"budget": {"schedule": [156, 122, 92, 68, 50, 36, 26, 18, 14, 10, 7, 4]}},
        [40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3],
        "157 123 93 69 51 37 27 19 15 11 8 5",
    ),
}


@pytest.mark.parametrize("level", PYRA)
def test_pyra(level: str, tmp_path: Path) -> None:
    budget, pairs, wanted = PYRA[level]
    gates: dict[str, Tensor] = {}
    for i, count in enumerate(pairs):
        gates |= {f"stages.{i}.channel": torch.zeros(count), f"stages.{i}.token": torch.zeros(WIDTH)}
        gates[f"stages.{i}.norm.weight"] = torch.ones(WIDTH)
    save_file(gates, tmp_path / "g.safetensors")
    assert lengths({"preset": "pyra", "weights": str(tmp_path / "g.safetensors"), **budget}) == numbers(wanted)


def test_tca() -> None:
    assert lengths({"preset": "tca"}) == [182, 167, 155]


def test_sit_slim(tmp_path: Path) -> None:
    """196, 98, 49, 24 patches in the four stages of 16 blocks."""
    made = {}
    for i, count in enumerate((98, 49, 24)):
        made[f"stages.{i}.norm.weight"] = torch.ones(WIDTH)
        made[f"stages.{i}.layers.0.weight"] = torch.ones(4, WIDTH)
        made[f"stages.{i}.layers.1.weight"] = torch.ones(count, 4)
    save_file(made, tmp_path / "m.safetensors")
    assert lengths({"preset": "sit-slim", "weights": str(tmp_path / "m.safetensors")}, 16) == [99, 50, 25]
