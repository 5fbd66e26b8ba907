"""A weight that is embedding and head at once is stored once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tokcc.backends.onnx import build_onnx
from tokcc.testing import trace


class Tied(nn.Module):
    """A vocabulary used on both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(ids))))  # type: ignore[no-any-return]


def test_the_vocabulary_is_stored_once() -> None:
    program = trace(Tied().eval(), {"ids": torch.randint(0, 50, (2, 5))})
    model = build_onnx(program)
    sizes = [
        int(np.prod(value.shape.numpy())) for value in model.graph.initializers.values() if value.shape is not None
    ]
    assert sizes.count(50 * 8) == 1
    assert "Transpose" in {node.op_type for node in model.graph}
