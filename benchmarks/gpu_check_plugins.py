"""The kernels of the TensorRT plugins as TensorRT would launch them: their PTX through the CUDA driver, no Triton."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check_cases import DTYPES, causal_lists
from tokcc.kernels.decompositions import overload
from tokcc.plugins_trt import PLUGINS, Call, Operand, Plugin, PluginUse
from tokcc.plugins_trt.driver import Kernel
from tokcc.plugins_trt.ptx import compile_tactics

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Prepared:
    """A call of a plugin.

    Attributes:
        plugin: The plugin.
        use: What its kernel is compiled for.
        inputs: Tensors in; one element for those left out.
        expected: What the operation's reference gives in fp32.
    """

    plugin: Plugin
    use: PluginUse
    inputs: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Return the sizes of the letters."""
        return self.plugin.sizes([tuple(tensor.shape) for tensor in self.inputs])

    def outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return memory for the outputs: NaN, or the input that is written over."""
        names = [each.name for each in self.plugin.inputs]
        return [
            inputs[names.index(each.alias)]
            if each.alias
            else inputs[0].new_full([int(self.sizes.get(axis, axis)) for axis in each.axes], float("nan"))
            for each in self.plugin.outputs
        ]


def prepare(op: str, args: Args) -> Prepared:
    """Return the call of a plugin for the arguments of the operation that it replaces."""
    plugin = PLUGINS[op]
    call: Call = plugin.arguments(*args)
    given = {k: None if x is None else Operand(x.dtype, tuple(x.shape)) for k, x in call.inputs.items()}
    use = plugin.takes(given, call.attributes)
    nodes = plugin.onnx_node(use)["inputs"]
    inputs = tuple(
        torch.zeros(1, dtype=dtype) if call.inputs[name] is None else call.inputs[name] for name, dtype, _ in nodes
    )
    wide = tuple(arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)
    found = reference(plugin)(*wide)
    return Prepared(plugin, use, inputs, tuple([found] if isinstance(found, Tensor) else found))


def reference(plugin: Plugin) -> Callable[..., Any]:
    """Return what a plugin's operation computes."""
    namespace, name = plugin.replaces.split("::")
    return overload(name) if namespace == "tokcc" else getattr(getattr(torch.ops, namespace), name).default


def _merge(weighted: bool, tokens: int, gone: int, channels: int, dtype: torch.dtype) -> Args:
    x = torch.randn(2, tokens, channels).to(dtype)
    order = torch.stack([torch.randperm(tokens) for _ in range(2)])
    weight = torch.randint(0, 5, (2, tokens)).to(dtype) if weighted else None
    kept = tokens - gone - 2
    # One slot behind the last joins nothing.
    slot = torch.randint(0, kept, (2, gone))
    return x, weight, order[:, :kept].contiguous(), order[:, kept : kept + gone].contiguous(), slot, 1, weighted


def _prompt(
    rows: int,
    keys: int,
    block: int,
    width: int,
    out: int,
    dtype: torch.dtype,
    *,
    masked: bool = False,
    cap: float = 0.0,
) -> Args:
    stored = keys + 5 if masked else keys
    q = torch.randn(2, 4, rows, width).to(dtype)
    k, v = (torch.randn(2, 2, stored, n).to(dtype) for n in (width, out))
    index, count = (x.expand(2, *x.shape[1:]).contiguous() for x in causal_lists(rows, keys, block, 2, 2, q.device))
    valid = torch.ones(2, keys, dtype=torch.bool)
    valid[1, : keys // 3] = False
    return q, k, v, index, count, block, block, True, width**-0.5, valid if masked else None, cap


def _decode(
    keys: int, page: int, lists: int, width: int, dtype: torch.dtype, *, masked: bool = False, cap: float = 0.0
) -> Args:
    q = torch.randn(2, 4, 1, width).to(dtype)
    k, v = (torch.randn(2, 2, keys, width).to(dtype) for _ in range(2))
    pages = -(-keys // page)
    index = torch.stack([torch.randperm(pages)[: pages - 1] for _ in range(2 * lists)]).int()
    count = torch.randint(0, pages, (2, lists)).int()
    valid = torch.rand(2, keys) > 0.3
    return q, k, v, index.reshape(2, lists, -1), count, page, width**-0.5, valid if masked else None, cap


def _write(entries: int, width: int, dtype: torch.dtype) -> Args:
    cache, new = torch.randn(2, 3, 41, width).to(dtype), torch.randn(2, 3, entries, width).to(dtype)
    return cache, 2, torch.randperm(41)[:entries], new


SMALL: Mapping[str, Sequence[Callable[[torch.dtype], Args]]] = {
    "block_sparse_attention": (
        lambda dtype: _prompt(40, 71, 32, 24, 20, dtype),
        lambda dtype: _prompt(40, 71, 24, 80, 80, dtype, masked=True, cap=0.7),
    ),
    "kv_update": (lambda dtype: _write(1, 24, dtype), lambda dtype: _write(13, 80, dtype)),
    "merge_tokens": (lambda dtype: _merge(True, 29, 9, 83, dtype), lambda dtype: _merge(False, 21, 3, 70, dtype)),
    "sparse_decode": (
        lambda dtype: _decode(163, 16, 2, 80, dtype, masked=True),
        lambda dtype: _decode(71, 1, 4, 24, dtype, cap=0.7),
        lambda dtype: _decode(71, 5, 1, 24, dtype),
    ),
}
"""Arguments of each plugin's operation, of odd sizes."""

LARGE: Mapping[str, Sequence[Callable[[torch.dtype], Args]]] = {
    "block_sparse_attention": (
        lambda dtype: _prompt(643, 700, 128, 128, 128, dtype),
        lambda dtype: _prompt(300, 333, 64, 64, 64, dtype, masked=True),
        lambda dtype: _prompt(100, 133, 32, 256, 256, dtype),
    ),
    "kv_update": (lambda dtype: _write(37, 128, dtype),),
    "merge_tokens": (lambda dtype: _merge(True, 577, 100, 1024, dtype),),
    "sparse_decode": (
        lambda dtype: _decode(3000, 16, 2, 128, dtype, masked=True),
        lambda dtype: _decode(700, 16, 2, 256, dtype),
    ),
}
"""The same of sizes that models have."""


def correct(op: str, args: Args, tolerance: float, device: torch.device) -> list[dict[str, Any]]:
    """Launch every tactic of a plugin with a plugin's arguments and compare with the reference."""
    prepared = prepare(op, args)
    results = []
    for compiled in compile_tactics(prepared.plugin, prepared.use):
        inputs = [tensor.to(device, copy=True) for tensor in prepared.inputs]
        outputs = prepared.outputs(inputs)
        grid, scalars = prepared.plugin.launch(prepared.use, compiled.config, prepared.sizes)
        with tempfile.TemporaryDirectory() as folder:
            # Read from a file, as the engine's builder does.
            path = Path(folder) / "kernel.ptx"
            path.write_text(compiled.ptx, encoding="utf-8")
            kernel = Kernel(path.read_bytes(), compiled.name)
        stream = torch.cuda.current_stream(device).cuda_stream
        addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (inputs, outputs)]
        kernel.launch(grid, compiled.threads, compiled.shared, stream, addresses[0], scalars, addresses[1])
        torch.cuda.synchronize(device)
        largest = difference(outputs, prepared.expected)
        results.append(
            {
                "plugin": op,
                "dtype": prepared.use.dtype,
                "attributes": dict(prepared.use.attributes),
                "tile": dict(compiled.config.tile),
                "largest_difference": largest,
                "limit": tolerance,
                "ok": largest <= tolerance,
            }
        )
    return results


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of any element; infinite where something is not finite."""
    gaps = [(x.cpu().double() - y.double()).abs() for x, y in zip(found, expected, strict=True)]
    return max(float(gap.max()) if gap.isfinite().all() else float("inf") for gap in gaps)


def check_all(tolerance: Mapping[torch.dtype, float], device: torch.device) -> list[dict[str, Any]]:
    """Check every plugin in every type."""
    import_module("triton")  # its absence is not a pass
    return [
        result
        for op in sorted(PLUGINS)
        for make in (*SMALL[op], *LARGE[op])
        for dtype in DTYPES
        for result in correct(op, make(dtype), tolerance[dtype], device)
    ]
