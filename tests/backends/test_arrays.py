"""Tensors as arrays and back, and what a bundle keeps of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tokcc.backends.arrays import to_array, to_tensor
from tokcc.backends.parity import numpy_feeds
from tokcc.backends.reference import load_reference, save_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    array = to_array(tensor)
    assert array.shape == shape
    again = to_tensor(array)
    assert again.dtype == dtype
    assert torch.equal(again, tensor)


def test_an_array_in_bfloat16_has_its_numbers() -> None:
    tensor = torch.tensor([1.0, -2.5, 3.140625, float("inf")], dtype=torch.bfloat16)
    np.testing.assert_array_equal(to_array(tensor).astype(np.float32), tensor.float().numpy())
    assert torch.equal(to_tensor(to_array(tensor.repeat(3, 1).T)), tensor.repeat(3, 1).T)


def test_a_bundle_keeps_types(tmp_path: Path) -> None:
    """A reference in bfloat16 is held to the tolerance of bfloat16 when the bundle is verified."""
    feeds = [{"x": torch.randn(2, 3).to(torch.bfloat16), "mask": torch.ones(2, 3, dtype=torch.int64)}]
    outputs = [[torch.randn(2, 4).to(torch.bfloat16), torch.randn(2)]]
    save_reference(tmp_path / "reference.npz", ["logits", "score"], feeds, outputs)
    ((given, wanted),) = load_reference(tmp_path / "reference.npz")
    assert list(wanted) == ["logits", "score"]
    for one, other in (*((given[n], feeds[0][n]) for n in feeds[0]), *zip(wanted.values(), outputs[0], strict=True)):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert set(numpy_feeds(given)) == {"x", "mask"}
