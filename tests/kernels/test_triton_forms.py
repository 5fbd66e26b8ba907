"""The operations that Inductor inlines for CUDA: same schema, traceable with symbolic sizes, only outputs written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import tokcc.kernels
from tests.kernels.installed import needs_triton
from tokcc.kernels.decompositions import overload, triton_forms

assert tokcc.kernels is not None


def _cases() -> dict[str, tuple[Any, ...]]:
    q, kv, cache = torch.randn(2, 4, 70, 16), torch.randn(2, 2, 70, 16), torch.randn(2, 3, 11, 6)
    blocks, counts = torch.zeros(2, 2, 3, 2, dtype=torch.int32), torch.ones(2, 2, 3, dtype=torch.int32)
    index, x = torch.tensor([[0, 2, 3]] * 2), torch.randn(2, 9, 5)
    return {
        "attention_columns": (q, q, torch.ones(2, 1, 1, 70, dtype=torch.bool), torch.ones(2, 70), 0.25, True),
        "attention_probs": (q, q, torch.ones(2, 1, 1, 70, dtype=torch.bool), 0.25),
        "block_sparse_attention": (q, kv, kv, blocks, counts, 32, 64, True, 0.25, torch.ones(2, 70, dtype=torch.bool)),
        "gather_slots": (cache, torch.zeros(2, 3, 4, dtype=torch.int64)),
        "gather_tokens": (x, index, 1, 0),
        "merge_tokens": (x, torch.ones(2, 9), index, index + 4, index * 0, 0, False),
        "retain_slots": (torch.randn(2, 3, 11), 4),
        "sparse_decode": (q[:, :, :1], kv, kv, blocks[:, :, 0], counts[:, :, 0], 16, 0.25),
        "topk_select": (torch.randn(2, 9), 4, False),
    }


@needs_triton
def test_every_kernel_has_a_case_and_the_schema_of_its_operation() -> None:
    forms = triton_forms()
    assert sorted(forms) == sorted(_cases())
    for name in forms:
        own, form = overload(name)._schema, overload(f"{name}_triton")._schema
        assert str(own).replace(name, "") == str(form).replace(f"{name}_triton", "")


@pytest.mark.parametrize("name", sorted(_cases()))
def test_cuda_has_a_kernel_of_its_own(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tokcc::{name}", "CUDA")


@pytest.fixture
def driver() -> Iterator[None]:
    """A driver that knows its target and nothing else: what finds out which arguments a kernel writes asks for it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    saved = driver._active
    driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    yield
    driver._active = saved


@needs_triton
@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("name", sorted(_cases()))
def test_traces_with_symbols_and_writes_outputs_only(name: str) -> None:
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    triton_forms()
    args = _cases()[name]
    tensors = [arg for arg in args if isinstance(arg, Tensor)]

    def call(*given: Tensor) -> Any:
        taken = iter(given)
        return overload(f"{name}_triton")(*(next(taken) if isinstance(arg, Tensor) else arg for arg in args))

    graph = make_fx(dispatch_functionalize(call), tracing_mode="symbolic")(*tensors).graph
    launches = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert launches
    for node in launches:
        written = node.kwargs["tensors_to_clone"]
        assert written
        # Where the selection stores depends on scores, which torch takes for a write to them: a copy of a row too many.
        outputs = [argument for argument in written if argument != "Score"]
        assert all(_is_fresh(node.kwargs["kwargs"][argument]) for argument in outputs), written
        assert any(isinstance(size, fx.Node) for size in node.kwargs["grid"][0])


def _is_fresh(node: fx.Node) -> bool:
    """Whether a tensor was made for this launch, and not handed in."""
    return node.op == "call_function" and "empty" in str(node.target)


BLOCKED = """
import sys
sys.modules["triton"] = None
import torch, tokcc.kernels, tokcc.pipeline
from tokcc.kernels import block_sparse_attention, gather_tokens
assert gather_tokens(torch.arange(6.0).reshape(1, 3, 2), torch.tensor([[2]]), 1, 0).tolist() == [[[4.0, 5.0]]]
assert not [name for name in sys.modules if name.startswith("tokcc.kernels") and name.endswith((".triton", ".device"))]
"""


def test_nothing_of_it_is_imported_or_needed_on_cpu() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
