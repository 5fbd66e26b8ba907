"""Programs in bfloat16, in float32: the same weights and choices, rounded less."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from tokcc.backends.onnx import build_onnx
from tokcc.ir.verify import verify
from tokcc.ir.widened import widened
from tokcc.testing import run_program, trace


class Mixed(nn.Module):
    """Computes in its weights' type, ranks in float32, and makes constants of both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 6)
        self.register_buffer("bias", torch.randn(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.inner(x) + self.bias.to(x.dtype)
        best = hidden.float().sum(2).topk(2, 1)
        hidden = torch.cat([hidden, torch.zeros_like(hidden)], 2).to(x.dtype)
        return hidden, best.values.to(x.dtype)


def test_it_computes_as_the_model_in_float32_with_rounded_weights() -> None:
    model = Mixed().to(torch.bfloat16).eval()
    x = torch.randn(3, 5, 6)
    wide = widened(trace(model, {"x": x.to(torch.bfloat16)}))
    verify(wide, "widened")
    # Not a type of it is left, be it said by an argument, a weight or a fake.
    assert "bfloat16" not in str([(node.args, node.kwargs, node.meta.get("val")) for node in wide.graph.nodes])
    assert all(tensor.dtype != torch.bfloat16 for tensor in wide.state_tensors().values())
    got, expected = run_program(wide, {"x": x}), model.float()(x)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_stay(dtype: torch.dtype) -> None:
    program = trace(Mixed().to(dtype), {"x": torch.randn(3, 5, 6, dtype=dtype)})
    assert widened(program) is program


def test_free_sizes_stay_free() -> None:
    model = Mixed().to(torch.bfloat16)
    axes = {"x": {1: torch.export.Dim("tokens", min=2, max=9)}}
    program = trace(model, {"x": torch.randn(3, 5, 6, dtype=torch.bfloat16)}, axes)
    (given,), (node,) = program.user_inputs, widened(program).user_inputs
    assert [str(size) for size in node.meta["val"].shape] == [str(size) for size in given.meta["val"].shape]
    (lowered,) = build_onnx(widened(program)).graph.inputs
    assert lowered.shape is not None
    assert isinstance(lowered.shape[1], ir.SymbolicDim)


def test_numbers_that_a_graph_holds_are_rounded() -> None:
    """CLIP multiplies by 1.702, which is 1.703125 in the graph."""

    class Factor(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 1.702, x.float() * 1.702

    program = widened(trace(Factor(), {"x": torch.randn(2, 3).to(torch.bfloat16)}))
    x = torch.randn(2, 3)
    rounded, exact = run_program(program, {"x": x})
    torch.testing.assert_close(rounded, x * 1.703125)
    torch.testing.assert_close(exact, x * 1.702)
