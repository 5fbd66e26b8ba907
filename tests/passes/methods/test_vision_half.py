"""Methods inside vision transformers in half precision: the dtype stays, the result is near that of full precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.passes.oracle import policy, program_of
from tests.passes.reference_models import WIDTH, patches, vision
from tokcc.testing import reduce_program, run_program, trace


def weights() -> dict[str, torch.Tensor]:
    """Of the gates of 9 pairs, and of a module that makes 20 tokens."""
    generator = torch.Generator().manual_seed(1)
    return {
        "stages.0.channel": torch.randn(9, generator=generator),
        "stages.0.token": 0.3 * torch.randn(WIDTH, generator=generator),
        "stages.0.norm.weight": torch.ones(WIDTH),
        "stages.0.layers.0.weight": torch.randn(6, WIDTH, generator=generator) / 4,
        "stages.0.layers.1.weight": torch.randn(20, 6, generator=generator),
    }


STEPS: dict[str, dict[str, Any]] = {
    "ats": {"references": 31, "at": {"layers": [3]}},
    "as-vit": {"thresholds": [0.01], "at": {"layers": [2]}, "budget": {"tokens": 30}},
    "tca": {"rate": 0.9, "at": {"layers": [3]}},
    "dymu": {"thresholds": [0.6], "r": 3, "at": {"layers": [3]}},
    "token-transforming": {"at": {"layers": [3]}},
    "pyra": {"r": 9, "weights": "", "at": {"layers": [3]}},
    "sit-slim": {"weights": "", "at": {"layers": [2]}, "budget": {"tokens": 20}},
}


@pytest.mark.parametrize("name", STEPS)
def test_half_precision(name: str, tmp_path: Path) -> None:
    step = {"preset": name, **STEPS[name]}
    if "weights" in step:
        save_file(weights(), tmp_path / "weights.safetensors")
        step["weights"] = str(tmp_path / "weights.safetensors")
    model, feeds = copy.deepcopy(vision()).half(), {"patches": patches(2, 50)}
    half = {"patches": feeds["patches"].half()}
    reduced, _ = reduce_program(trace(model, half), policy(step))
    tokens, pooled = run_program(reduced, half)[:2]
    assert tokens.dtype == pooled.dtype == torch.float16
    assert tokens.isfinite().all()
    exact = run_program(reduce_program(program_of(vision(), feeds), policy(step))[0], feeds)[1]
    assert (pooled.float() - exact).abs().max() < 0.1
