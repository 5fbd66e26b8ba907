"""ONNX models in bfloat16, run in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from tokcc.backends.float32 import in_float32, open_in_float32
from tokcc.backends.onnx import build_onnx, save_onnx
from tokcc.backends.ort import Session
from tokcc.errors import LoweringError
from tokcc.testing import trace


class Typed(nn.Module):
    """A weight, a cast, and constants that a graph has in attributes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.inner(x)
        best = hidden.float().softmax(1).to(x.dtype)
        return {"found": torch.where(best > 0.3, best * 2.5, torch.full_like(best, -1.0))}


def model(dtype: torch.dtype, path: Path) -> Path:
    save_onnx(build_onnx(trace(Typed().to(dtype), {"x": torch.randn(3, 6, dtype=dtype)}), opset=22), path)
    return path


def test_it_runs_and_equals_the_model_with_rounded_weights(tmp_path: Path) -> None:
    path = model(torch.bfloat16, tmp_path / "model.onnx")
    before = path.read_bytes()
    with pytest.raises(LoweringError, match="onnxruntime does not load"):
        Session(path)
    x = torch.randn(3, 6)
    with torch.no_grad():
        expected = Typed().to(torch.bfloat16).float()(x)["found"]
    found = open_in_float32(path).run({"x": x.numpy()})
    np.testing.assert_allclose(found["found"], expected.numpy(), rtol=1e-5, atol=1e-6)
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_models_are_run_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    path = model(dtype, tmp_path / "model.onnx")
    assert not in_float32(ir.load(path))
    x = torch.randn(3, 6, dtype=dtype).numpy()
    np.testing.assert_array_equal(open_in_float32(path).run({"x": x})["found"], Session(path).run({"x": x})["found"])


def test_bodies_of_branches_too() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 22]>
        f (bool choice, bfloat16[2] x) => (bfloat16[2] y) {
            y = If (choice) <
                then_branch = yes () => (bfloat16[2] one) { one = Add (x, x) },
                else_branch = no () => (bfloat16[2] two) {
                    c = Constant <value = bfloat16[2] {16256, 16384}> ()
                    d = Cast <to = 1> (c)
                    two = Cast <to = 16> (d)
                }
            >
        }
    """
    read = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    assert in_float32(read)
    written = ir.serde.serialize_model(read)
    onnx.checker.check_model(written, full_check=True)
    assert "elem_type: 16" not in str(written)
    assert "data_type: 16" not in str(written)
    assert not in_float32(read)
