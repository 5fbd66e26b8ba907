"""Run every Triton kernel on the GPU that is there: its results against the CPU's, and its speed.

python -m benchmarks.gpu_check [--no-speed]

The kernels of the TensorRT plugins are launched as TensorRT would, from their PTX through the CUDA driver.
Writes ``benchmarks/results/<device>.json`` and fails when a kernel's results are off.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, gpu_check_plugins
from benchmarks.gpu_check_cases import CHECKS, DTYPES, Args, Check, prefill
from tokcc.kernels.configs import row
from tokcc.kernels.decompositions import overload, triton_forms
from tokcc.kernels.gpu import arch_of

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
KEPT = (4, 8, 16, 64)
"""Blocks of 128 that a row keeps of the 64 of 8192 tokens."""


def main(arguments: list[str] | None = None) -> int:
    """Check, time and write; 1 without a device or with results that are off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-speed", action="store_true", help="results only")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("not run: torch sees no CUDA device here", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    torch.manual_seed(0)
    content: dict[str, Any] = {
        "environment": {**environment.describe(torch.get_num_threads()), "gpu": name, "arch": arch_of(device)},
        "results": [correct(op, dtype, device) for op in sorted(triton_forms()) for dtype in DTYPES],
        "tensorrt_plugins": gpu_check_plugins.check_all(TOLERANCE, device),
    }
    if not options.no_speed:
        content["speed"] = {op: speed(op, check, device) for op, check in CHECKS.items()}
        content["prefill"] = [prefill_speed(kept, device) for kept in KEPT]
    path = environment.write_results(re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"), content)
    results = [*content["results"], *content["tensorrt_plugins"]]
    print(json.dumps(results, indent=1))
    print(path)
    return 0 if all(result["ok"] for result in results) else 1


def tensors(found: Any) -> list[Tensor]:
    """Return an operation's outputs as a list."""
    return [found] if isinstance(found, Tensor) else list(found)


def correct(op: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Compare the kernel, and the form that Inductor inlines, with the CPU reference in fp32."""
    check = CHECKS[op]  # a kernel without a case fails here
    args = check.small(dtype)
    wide = tuple(arg.float() if isinstance(arg, Tensor) and arg.dtype == dtype else arg for arg in args)
    there = tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args)
    expected = tensors(overload(op)(*wide))
    largest = 0.0
    for form in (overload(op), overload(f"{op}_triton")):
        for found, want in zip(tensors(form(*there)), expected, strict=True):
            difference = (found.cpu().double() - want.double()).abs()
            largest = max(largest, float(difference.max()) if difference.isfinite().all() else float("inf"))
    limit = 0.0 if check.by_score else TOLERANCE[dtype]
    return {"op": op, "dtype": str(dtype), "largest_difference": largest, "limit": limit, "ok": largest <= limit}


def milliseconds(run: Callable[[], object]) -> float:
    """Return the median of a warm call."""
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))


def speed(op: str, check: Check, device: torch.device) -> dict[str, Any]:
    """Time a large call beside the same in torch operations."""
    args = check.large(device)
    reference = import_module(f"tokcc.kernels.{op}.reference").reference
    own, plain = milliseconds(lambda: overload(op)(*args)), milliseconds(lambda: reference(*args))
    return {"ms": own, "reference_ms": plain, "gigabytes_per_second": check.moved(args) / own / 1e6}


def prefill_speed(kept: int, device: torch.device) -> dict[str, Any]:
    """Time sparse prefill of 8192 tokens beside flash attention and FlexAttention with the same mask."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    args = prefill(8192, 128, kept, torch.bfloat16, device)
    q, k, v, _, count = args[:5]

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    launch = import_module("tokcc.kernels.block_sparse_attention.triton").launch
    own = milliseconds(lambda: launch(*args))
    operations = 4 * 128 * 128 * 128 * int(count.sum()) * (q.shape[1] // k.shape[1])
    return {
        "blocks_kept": kept,
        "ms": own,
        "teraflops_of_listed_blocks": operations / own / 1e9,
        "flash_sdpa_ms": milliseconds(flash),
        "flex_attention_ms": milliseconds(flex(args)),
        # What tuning would choose among the shipped configurations.
        "configurations": [
            {**config.options(), "ms": milliseconds(lambda config=config: launch(*args, config=config))}
            for config in row("block_sparse_attention", "attend", arch_of(device), "half 128")
        ],
    }


def flex(args: Args) -> Callable[[], Tensor]:
    """Return FlexAttention, compiled, with the lists as its mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, index, count, block = args[:6]
    used = torch.arange(index.shape[3], device=q.device) < count[..., None]
    blocks = torch.arange(k.shape[2] // block, device=q.device)
    listed = ((index[..., None] == blocks) & used[..., None]).any(-2)[0]  # [Hkv, MQ, M]
    groups = q.shape[1] // k.shape[1]

    def seen(_b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return listed[h // groups, i // block, j // block] & (j <= i)

    mask = create_block_mask(seen, None, q.shape[1], q.shape[2], k.shape[2], device=str(q.device), BLOCK_SIZE=block)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


if __name__ == "__main__":
    raise SystemExit(main())
