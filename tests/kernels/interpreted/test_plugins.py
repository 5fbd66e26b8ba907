"""The kernels as TensorRT's plugins launch them: their own argument order, contiguous tensors, sizes from shapes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_check_plugins import SMALL, Prepared, prepare
from tokcc.kernels.configs import Config
from tokcc.kernels.kv_update.reference import reference
from tokcc.kernels.kv_update.triton import launch
from tokcc.plugins_trt import PLUGINS

TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CASES = [
    # The slowest ones in one type each, but for `make test-all`.
    pytest.param(op, number, dtype, marks=[pytest.mark.slow] if "block" in op and number != place else [])
    for op in sorted(SMALL)
    for number in range(len(SMALL[op]))
    for place, dtype in enumerate(TOLERANCE)
]


def run(prepared: Prepared, config: Config) -> list[Tensor]:
    """Launch with inputs, sizes, outputs, as a plugin does."""
    module, name = prepared.plugin.kernel
    inputs = [tensor.clone() for tensor in prepared.inputs]
    outputs = prepared.outputs(inputs)
    grid, scalars = prepared.plugin.launch(prepared.use, config, prepared.sizes)
    constants: dict[str, Any] = prepared.plugin.constants(prepared.use.dtype, prepared.use.attributes)
    getattr(import_module(module), name)[grid](*inputs, *scalars, *outputs, **constants, **config.options())
    return outputs


def test_every_plugin_has_a_case() -> None:
    assert sorted(SMALL) == sorted(PLUGINS)


@pytest.mark.parametrize(("op", "number", "dtype"), CASES)
def test_equals_the_reference(op: str, number: int, dtype: torch.dtype) -> None:
    torch.manual_seed(number)
    prepared = prepare(op, SMALL[op][number](dtype))
    for config in PLUGINS[op].tactics(prepared.use.dtype, prepared.use.attributes):
        found = run(prepared, config)
        for output, expected in zip(found, prepared.expected, strict=True):
            assert output.dtype == dtype
            assert output.shape == expected.shape
            torch.testing.assert_close(output.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_entries_are_written_into_a_cache(dtype: torch.dtype) -> None:
    cache, new = torch.randn(2, 3, 11, 20).to(dtype), torch.randn(2, 5, 3, 20).to(dtype).transpose(1, 2)
    place = torch.tensor([7, 0, 3, 10, 4])
    expected = reference(cache, new, place)
    assert not torch.equal(expected, cache)
    found = launch(cache, new, place)
    assert found is cache
    assert torch.equal(found, expected)


def test_slots_that_are_not_there_are_left_out() -> None:
    cache, new = torch.zeros(1, 2, 4, 8), torch.ones(1, 2, 3, 8)
    launch(cache, new, torch.tensor([4, 2, -1]))
    assert cache[:, :, 2].eq(1).all()
    assert cache.sum() == 2 * 8
