"""Methods that choose tokens at the output of an image encoder, on real architectures, in ONNX Runtime."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zoo.matrix import LIMIT, relative_difference
from tests.zoo.models import ZOO
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.backends.ort import Session
from tokcc.backends.parity import oracle
from tokcc.errors import PlanError
from tokcc.ir.program import Program
from tokcc.passes.propagate import Propagate
from tokcc.passes.slice_demand import SliceDemand
from tokcc.testing import plan_for, trace

STEPS: dict[str, dict[str, Any]] = {
    "vispruner": {"tokens": 20},
    "hiprune": {"tokens": 20, "alpha": 0.5},
    "visionzip": {"tokens": 20, "contextual": 6},
    "visiondrop": {},
    "prumerge": {"tokens": 16},
    "prumerge-plus": {"tokens": 20},
    "todre": {"keep": 0.2, "against": "all"},
    "hired": {},
    "token-corr": {"similar": 0.3},
    "flowcut": {"at": {"layers": [0, 2]}, "schedule": [40, 12]},
    "zoo-prune": {"tokens": 12, "directions": 4},
    "vqtoken": {"tokens": 10},
    "divprune": {},
    "fastervlm": {"tokens": 12},
    "vtc-cls": {"tokens": 12},
}
NO_CLASS_TOKEN = ("hiprune", "zoo-prune", "divprune", "vqtoken")


@cache
def program_of(model: str) -> Program:
    """Five images: a thumbnail and its crops, for the methods that take a batch as one image."""
    return trace(ZOO[model].build(), ZOO[model].inputs(5))


@pytest.mark.parametrize(
    ("model", "preset"),
    [*(("clip_vision", name) for name in STEPS), *(("siglip_vision", name) for name in NO_CLASS_TOKEN)],
)
def test_engine_equals_its_oracle(model: str, preset: str, tmp_path: Path) -> None:
    program = program_of(model)
    plan = plan_for(
        program, {"version": 1, "steps": [{"preset": preset, **STEPS[preset]}], "outputs": {"*": "reduced"}}
    )
    whole = Propagate(plan).run(program).program
    assert any(space.reduced for space in plan.made)
    path = tmp_path / "model.onnx"
    save_onnx(build_onnx(SliceDemand(plan.sites).run(whole).program), path)
    inputs = ZOO[model].inputs(5, seed=3)
    names = [node.name for node in whole.user_inputs]
    expected = oracle(whole)(dict(zip(names, inputs.values(), strict=True)))
    got = Session(path, threads=1).run({n: v.numpy() for n, v in zip(names, inputs.values(), strict=True)})
    assert len(expected) == len(whole.output_names) > len(program.output_names)
    for name, want in zip(whole.output_names, expected, strict=True):
        found = torch.from_numpy(got[name])
        if want.is_floating_point():
            assert relative_difference(found, want) < LIMIT, name
        else:
            assert torch.equal(found, want), name


@pytest.mark.parametrize("preset", sorted(set(STEPS) - set(NO_CLASS_TOKEN)))
def test_a_missing_class_token_is_refused(preset: str) -> None:
    with pytest.raises(PlanError, match="class token") as caught:
        plan_for(program_of("siglip_vision"), {"version": 1, "steps": [{"preset": preset, **STEPS[preset]}]})
    assert "attention_received" in (caught.value.help or "")


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[pytest.mark.slow] * (name != "prumerge")) for name in STEPS]
)
def test_half_precision(preset: str, tmp_path: Path) -> None:
    """The engine gives tokens of the model's type; which of nearly equal ones are kept, rounding decides."""
    program = half()
    plan = plan_for(
        program, {"version": 1, "steps": [{"preset": preset, **STEPS[preset]}], "outputs": {"*": "reduced"}}
    )
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
