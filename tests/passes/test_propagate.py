"""Dynamic sizes stay dynamic through a reduction, or the reduction is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from torch.export import Dim

from tests.passes.reference_models import audio, frames
from tokcc.backends.onnx import build_onnx
from tokcc.errors import AxisError
from tokcc.ir.program import Program
from tokcc.passes.cut import Cut, Kept
from tokcc.passes.selectors.uniform import Uniform
from tokcc.testing import reduce_program, run_eager, run_program, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")


def traced(tokens: int) -> Program:
    shapes = {"frames": {0: Dim("batch", min=1, max=9), 1: Dim("sequence", min=1, max=60)}}
    return trace(audio(2), {"frames": frames(2, tokens)}, shapes)


def policy(outputs: str = "reduced", **step: Any) -> dict[str, Any]:
    return {"version": 1, "steps": [{"at": {"layers": [0]}, **step}], "outputs": {"tokens": outputs}}


def session(program: Program) -> ort.InferenceSession:
    return ort.InferenceSession(ir.to_proto(build_onnx(program)).SerializeToString())


ONE_LEFT = [
    (16, {"node": "prune", "score": {"kind": "norm"}, "select": {"kind": "topk"}, "budget": {"remove": 15}}),
    (16, {"node": "prune", "select": {"kind": "uniform"}, "budget": {"keep": 0.0625}}),
    (2, {"node": "merge", "select": {"kind": "bipartite"}, "budget": {"remove": 1}}),
    (2, {"node": "merge", "select": {"kind": "energy"}, "budget": {"remove": 1}}),
    (2, {"node": "merge", "select": {"kind": "adjacent"}, "budget": {"remove": 1}}),
]


@pytest.mark.parametrize(("tokens", "step"), ONE_LEFT, ids=[str(s["select"]["kind"]) for _, s in ONE_LEFT])
def test_one_token_of_the_example_is_left(tokens: int, step: dict[str, Any]) -> None:
    """The sizes 0 and 1 of an example are sizes like others: the engine runs at every length, and says so."""
    program = traced(tokens)
    reduced, _ = reduce_program(program, policy(**step))
    engine = session(reduced)
    assert all(isinstance(size, str) for output in engine.get_outputs() for size in output.shape[:2])
    for length in (23, 5, 2):  # as torch.export says, from 2 on
        feeds = {"frames": frames(3, length, seed=length)}
        expected, _ = run_eager(program, policy(**step), feeds)
        for got, mine, want in zip(
            engine.run(None, {"frames": feeds["frames"].numpy()}), run_program(reduced, feeds), expected, strict=True
        ):
            torch.testing.assert_close(mine, want, rtol=0, atol=1e-5)
            torch.testing.assert_close(torch.from_numpy(np.array(got)), want, rtol=1e-4, atol=1e-4)


def _at_least_ten(x: Tensor) -> Tensor:
    return x + 0 if x.shape[1] >= 10 else x


def _example_only(x: Tensor) -> Tensor:
    return x * int(x.shape[1])


@pytest.mark.parametrize(("fixing", "found"), [(_at_least_ten, "10 to 60"), (_example_only, "only 16")])
def test_a_size_that_is_fixed_is_refused(fixing: Any, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an operation decides by the example's sizes holds for the example alone."""
    select = Uniform.select

    def deciding(self: Uniform, cut: Cut, score: Any) -> Kept:
        cut.b.call(fixing, cut.x)
        return select(self, cut, score)

    monkeypatch.setattr(Uniform, "select", deciding)
    with pytest.raises(AxisError, match="the dynamic size `frames_1`") as caught:
        reduce_program(traced(16), policy(node="prune", select={"kind": "uniform"}, budget={"keep": 0.5}))
    error = caught.value
    assert "axis 1 of `frames`" in error.what
    assert error.node is not None
    assert fixing.__name__ in error.node
    assert "@0" in error.node
    assert error.needed is not None
    assert error.needed.startswith("2 to 60")
    assert error.found == found
    assert error.help is not None
    assert "range" in error.help
