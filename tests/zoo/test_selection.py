"""Methods that choose tokens at the output of an image encoder: without a class token, and in half precision."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.zoo.arguments import arguments
from tests.zoo.contract import program_of
from tests.zoo.models import ZOO
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.backends.ort import Session
from tokcc.backends.parity import oracle
from tokcc.errors import PlanError
from tokcc.ir.program import Program
from tokcc.passes.propagate import Propagate
from tokcc.testing import plan_for, trace

AT_THE_END = (
    "vispruner",
    "hiprune",
    "visionzip",
    "visiondrop",
    "prumerge",
    "prumerge-plus",
    "todre",
    "hired",
    "token-corr",
    "flowcut",
    "zoo-prune",
    "vqtoken",
    "divprune",
    "fastervlm",
    "vtc-cls",
)
"""Methods that choose tokens at the output of an image encoder; test_contract.py runs them on all encoders."""
NO_CLASS_TOKEN = ("hiprune", "zoo-prune", "divprune", "vqtoken")


@pytest.mark.parametrize("preset", sorted(set(AT_THE_END) - set(NO_CLASS_TOKEN)))
def test_a_missing_class_token_is_refused(preset: str) -> None:
    with pytest.raises(PlanError, match="class token") as caught:
        plan_for(program_of("siglip_vision"), {"version": 1, "steps": [arguments(preset)]})
    assert "attention_received" in (caught.value.help or "")


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[pytest.mark.slow] * (name != "prumerge")) for name in AT_THE_END]
)
def test_half_precision(preset: str, tmp_path: Path) -> None:
    """The engine gives tokens of the model's type; which of nearly equal ones are kept, rounding decides."""
    program = half()
    plan = plan_for(program, {"version": 1, "steps": [arguments(preset)], "outputs": {"*": "reduced"}})
    whole = Propagate(plan).run(program).program
    path = tmp_path / "model.onnx"
    save_onnx(build_onnx(whole), path)
    inputs = {name: value.half() for name, value in ZOO["clip_vision"].inputs(5, seed=3).items()}
    names = [node.name for node in whole.user_inputs]
    expected = oracle(whole)(dict(zip(names, inputs.values(), strict=True)))
    got = Session(path, threads=1).run({n: v.numpy() for n, v in zip(names, inputs.values(), strict=True)})
    for name, want in zip(whole.output_names, expected, strict=True):
        assert got[name].shape == want.shape
        assert torch.from_numpy(got[name]).dtype == want.dtype
        assert bool(torch.from_numpy(got[name]).isfinite().all())


@cache
def half() -> Program:
    entry = ZOO["clip_vision"]
    return trace(entry.build().half(), {name: value.half() for name, value in entry.inputs(5).items()})
