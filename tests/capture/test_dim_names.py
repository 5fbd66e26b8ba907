"""Dynamic sizes carry the caller's names through to the engine."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.passes.reference_models import sentences, text
from tokcc.backends.onnx import build_onnx
from tokcc.capture.export import capture
from tokcc.capture.load import load
from tokcc.ir.program import Program
from tokcc.testing import reduce_program, trace

# torch's own pytree copies a deprecated class in run_decompositions.
pytestmark = pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning")


class Pair(nn.Module):
    """Two inputs of different lengths."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left.sum(1) + right.sum(1)


PAIR = {"left": torch.randn(3, 6, 4), "right": torch.randn(3, 9, 4)}


def dims(program: Program) -> dict[str, list[Any]]:
    session = ort.InferenceSession(ir.to_proto(build_onnx(program)).SerializeToString())
    return {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}


def captured(**options: Any) -> dict[str, list[Any]]:
    return dims(capture(load(Pair(), example_inputs=PAIR, **options)))


def test_names_of_dims() -> None:
    batch, length = Dim("samples", min=1, max=9), Dim("length", min=1, max=64)
    found = captured(dynamic_shapes={"left": {0: batch, 1: length}, "right": {0: batch, 1: Dim("other", max=64)}})
    assert found == {"left": ["samples", "length", 4], "right": ["samples", "other", 4], "output": ["samples", 4]}


def test_dims_by_position() -> None:
    batch = Dim("samples", min=1, max=9)
    found = captured(dynamic_shapes=({0: batch}, (batch, None, None)))
    assert found == {"left": ["samples", 6, 4], "right": ["samples", 9, 4], "output": ["samples", 4]}


def test_unnamed_dims_are_called_after_where_they_stand() -> None:
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    found = captured(dynamic_shapes={"left": free, "right": free})
    assert found == {"left": ["batch", "left_1", 4], "right": ["batch", "right_1", 4], "output": ["batch", 4]}


def test_the_command_lines_form() -> None:
    found = captured(dynamic=["left:0=1..9", "right:0=1..9", "left:1=1..64"])
    assert found == {"left": ["batch", "left_1", 4], "right": ["batch", 9, 4], "output": ["batch", 4]}


def test_an_axis_0_of_one_input_is_no_batch() -> None:
    class Same(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left.sum(0) + right.sum(0)[:6]

    program = capture(load(Same(), example_inputs=PAIR, dynamic=["left:0=1..9"]))
    assert dims(program)["left"] == ["left_0", 6, 4]


def test_sizes_behind_a_reduction() -> None:
    """A simple difference is spelled out, anything else gets a name."""
    shapes = {name: {0: Dim("batch", max=9), 1: Dim("sequence", min=4, max=60)} for name in ("ids", "mask")}
    program = trace(text(2), sentences([16, 12]), shapes)
    found = dims(reduce_program(program, "none")[0])
    assert found["ids"] == found["mask"] == found["tokens"][:2] == ["batch", "ids_1"]
    reduced, _ = reduce_program(
        program, {"version": 1, "steps": [{"preset": "power-bert"}], "outputs": {"*": "reduced"}}
    )
    found = dims(reduced)
    assert found["tokens"][0] == "batch"
    assert found["tokens"][1].startswith("reduced_")
    assert found["tokens"][1] == found["tokens.token_index"][1]
