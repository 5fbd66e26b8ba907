"""Shape operations and constructors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from tokcc.errors import LoweringError
from tokcc.lowering.onnx.translate import Translator, ir_dtype

__all__ = ["LOWERINGS", "transposed"]

aten = torch.ops.aten
_LARGEST_CONSTANT = 4096
"""Elements; what is larger is filled at run time."""


def _rank(node: Any) -> int:
    return int(node.meta["val"].ndim)


def reshape(t: Translator, node: fx.Node, x: Any, shape: Sequence[Any]) -> Any:
    """Reshape; symbolic axes that lead and stay in place are written as 0, so that no size is computed."""
    target = list(shape)
    source = x.meta["val"].shape
    if any(isinstance(s, fx.Node) for s in target):
        wanted = node.meta["val"].shape
        for i, size in enumerate(target):
            if isinstance(size, fx.Node) and i < len(source) and str(source[i]) == str(wanted[i]):
                target[i] = 0
        symbolic = [i for i, s in enumerate(target) if isinstance(s, fx.Node)]
        if len(symbolic) == 1 and -1 not in target:
            target[symbolic[0]] = -1
    return t.op("Reshape", t.value(x), t.sizes(target))


def _flat_sizes(t: Translator, node: fx.Node, x: Any, target: Sequence[int]) -> Any:
    """Return the sizes of a flatten with several symbolic axes: those that it only moves are read from its source."""
    known = {str(size): axis for axis, size in enumerate(x.meta["val"].shape) if not isinstance(size, int)}
    wanted: list[Any] = list(target)
    for i, size in enumerate(node.meta["val"].shape):
        if wanted[i] == -1 and str(size) in known:
            wanted[i] = t.axis(x, known[str(size)])
    if wanted.count(-1) > 1:
        raise LoweringError("a flatten over several symbolic axes", node=node.name)
    parts = [t.op.ints([size]) if isinstance(size, int) else size for size in wanted]
    return t.op("Concat", *parts, axis=0)


def flatten(t: Translator, node: fx.Node, x: Any, *rest: Any) -> Any:
    """``flatten`` and ``unflatten`` by the shape of their result."""
    del rest
    target = [s if isinstance(s, int) else -1 for s in node.meta["val"].shape]
    source = x.meta["val"].shape
    for i, size in enumerate(node.meta["val"].shape):
        if not isinstance(size, int) and i < len(source) and str(source[i]) == str(size):
            target[i] = 0
    if target.count(-1) > 1:
        return t.op("Reshape", t.value(x), _flat_sizes(t, node, x, target))
    return t.op("Reshape", t.value(x), t.op.ints(target))


def permute(t: Translator, node: fx.Node, x: Any, dims: Sequence[int]) -> Any:
    """Reorder axes; two in a row become one."""
    del node
    rank = _rank(x)
    return transposed(t, t.value(x), [d % rank for d in dims])


def transposed(t: Translator, value: Any, perm: list[int]) -> Any:
    """Reorder the axes of a value that may be a reordering itself."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose":
        inner = list(producer.attributes["perm"].as_ints())
        perm = [inner[p] for p in perm]
        value = producer.inputs[0]
    return value if perm == list(range(len(perm))) else t.op("Transpose", value, perm=perm)


def transpose(t: Translator, node: fx.Node, x: Any, first: int, second: int) -> Any:
    """Swap two axes."""
    rank = _rank(x)
    perm = list(range(rank))
    perm[first % rank], perm[second % rank] = perm[second % rank], perm[first % rank]
    return permute(t, node, x, perm)


def matrix_transpose(t: Translator, node: fx.Node, x: Any) -> Any:
    """Transpose of a matrix."""
    return permute(t, node, x, list(range(_rank(x)))[::-1])


def unsqueeze(t: Translator, node: fx.Node, x: Any, dim: int) -> Any:
    """Insert an axis."""
    return t.op("Unsqueeze", t.value(x), t.op.ints([dim % _rank(node)]))


def squeeze(t: Translator, node: fx.Node, x: Any, dim: Any = None) -> Any:
    """Remove axes of size one."""
    del node
    dims = range(_rank(x)) if dim is None else [dim] if isinstance(dim, int) else dim
    shape = x.meta["val"].shape
    gone = sorted(d % _rank(x) for d in dims if isinstance(shape[d], int) and shape[d] == 1)
    return t.op("Squeeze", t.value(x), t.op.ints(gone)) if gone else t.value(x)


def expand(t: Translator, node: fx.Node, x: Any, shape: Sequence[Any], **kwargs: Any) -> Any:
    """Broadcast; an axis that keeps its size is written as 1."""
    del kwargs
    source = x.meta["val"].shape
    lead = len(shape) - len(source)
    target: list[Any] = []
    wide = lead > 0
    for i, size in enumerate(shape):
        own = source[i - lead] if i >= lead else None
        keeps = isinstance(size, int) and size == -1
        stays = own is not None and (keeps or str(own) == str(node.meta["val"].shape[i]))
        target.append(1 if stays else size)
        wide |= not stays
    return t.op("Expand", t.value(x), t.sizes(target)) if wide else t.value(x)


def repeat(t: Translator, node: fx.Node, x: Any, repeats: Sequence[Any]) -> Any:
    """Tile."""
    del node
    value = t.value(x)
    lead = len(repeats) - _rank(x)
    if lead:
        value = t.op("Unsqueeze", value, t.op.ints(list(range(lead))))
    if all(isinstance(r, int) and r == 1 for r in repeats):
        return value
    return t.op("Tile", value, t.sizes(repeats))


def cat(t: Translator, node: fx.Node, xs: Sequence[Any], dim: int = 0) -> Any:
    """Concatenate, leaving out empty parts."""
    dtype = node.meta["val"].dtype
    parts = [x for x in xs if not any(isinstance(s, int) and s == 0 for s in x.meta["val"].shape)]
    values = [t.value(x, dtype) for x in parts or xs[:1]]
    return values[0] if len(values) == 1 else t.op("Concat", *values, axis=dim % _rank(node))


def stack(t: Translator, node: fx.Node, xs: Sequence[Any], dim: int = 0) -> Any:
    """Stack along a new axis."""
    axis = dim % _rank(node)
    dtype = node.meta["val"].dtype
    values = [t.op("Unsqueeze", t.value(x, dtype), t.op.ints([axis])) for x in xs]
    return t.op("Concat", *values, axis=axis)


def split_with_sizes(t: Translator, node: fx.Node, x: Any, sizes: Sequence[Any], dim: int = 0) -> Any:
    """Split into parts of given sizes."""
    del node
    axis = dim % _rank(x)
    if len(sizes) == 1:
        return (t.value(x),)
    return t.op("Split", t.value(x), t.sizes(sizes), outputs=len(sizes), axis=axis)


def split(t: Translator, node: fx.Node, x: Any, size: Any, dim: int = 0) -> Any:
    """Split into equal parts."""
    del size
    axis = dim % _rank(x)
    parts = [v.shape[axis] for v in node.meta["val"]]
    if not all(isinstance(p, int) for p in parts):
        raise LoweringError("a split of a symbolic axis", node=node.name)
    return split_with_sizes(t, node, x, parts, axis)


def unbind(t: Translator, node: fx.Node, x: Any, dim: int = 0) -> Any:
    """Take every position of an axis."""
    axis = dim % _rank(x)
    count = x.meta["val"].shape[axis]
    if not isinstance(count, int):
        raise LoweringError("an unbind of a symbolic axis", node=node.name)
    return tuple(t.op("Gather", t.value(x), t.op.constant(i, ir_dtype(torch.int64)), axis=axis) for i in range(count))


def arange(t: Translator, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """``arange(stop)``, ``arange(start, stop)``, ``arange(start, stop, step)``."""
    del kwargs
    start, stop, step = (0, args[0], 1) if len(args) == 1 else (*args, 1)[:3]
    dtype = node.meta["val"].dtype
    if all(isinstance(a, int) for a in (start, stop, step)):
        return t.op.constant(list(range(start, stop, step)), ir_dtype(dtype))
    if all(isinstance(a, int | float) for a in (start, stop, step)):
        return t.op.constant(torch.arange(start, stop, step, dtype=torch.float64).numpy(), ir_dtype(dtype))
    if any(isinstance(a, float) for a in (start, stop, step)):
        return t.op("Range", *(t.value(a, dtype) for a in (start, stop, step)))
    made = t.op("Range", *(t.value(a, torch.int64) for a in (start, stop, step)))
    return made if dtype == torch.int64 else t.op("Cast", made, to=int(ir_dtype(dtype)))


def _filled(t: Translator, node: fx.Node, value: Any, sizes: Callable[[], Any]) -> Any:
    """A constant where it is small, else a fill of the sizes."""
    fake = node.meta["val"]
    dtype = ir_dtype(fake.dtype)
    if all(isinstance(s, int) for s in fake.shape) and fake.numel() <= _LARGEST_CONSTANT:
        return t.op.constant(np.full(tuple(fake.shape), value), dtype)
    return t.op("ConstantOfShape", sizes(), value=ir.tensor([value], dtype=dtype))


def full(t: Translator, node: fx.Node, shape: Sequence[Any], value: Any, **kwargs: Any) -> Any:
    """Constant tensor of sizes."""
    del kwargs
    return _filled(t, node, value, lambda: t.sizes(shape))


def new_full(t: Translator, node: fx.Node, x: Any, shape: Sequence[Any], value: Any, **kwargs: Any) -> Any:
    """``x.new_full``."""
    del x
    return full(t, node, shape, value, **kwargs)


def _constructor(value: float) -> Any:
    def lower(t: Translator, node: fx.Node, shape: Sequence[Any], **kwargs: Any) -> Any:
        return full(t, node, shape, value, **kwargs)

    return lower


def _new(value: float) -> Any:
    def lower(t: Translator, node: fx.Node, x: Any, shape: Sequence[Any], **kwargs: Any) -> Any:
        del x
        return full(t, node, shape, value, **kwargs)

    return lower


def _like(value: float | None) -> Any:
    def lower(t: Translator, node: fx.Node, x: Any, *rest: Any, **kwargs: Any) -> Any:
        del kwargs
        number = rest[0] if value is None else value
        return _filled(t, node, number, lambda: t.op("Shape", t.value(x)))

    return lower


LOWERINGS: dict[Any, Any] = {
    aten.reshape.default: reshape,
    aten.view.default: reshape,
    aten._unsafe_view.default: reshape,
    aten.flatten.using_ints: flatten,
    aten.unflatten.int: flatten,
    aten.permute.default: permute,
    aten.transpose.int: transpose,
    aten.t.default: matrix_transpose,
    aten.unsqueeze.default: unsqueeze,
    aten.squeeze.default: squeeze,
    aten.squeeze.dim: squeeze,
    aten.squeeze.dims: squeeze,
    aten.expand.default: expand,
    aten.repeat.default: repeat,
    aten.cat.default: cat,
    aten.stack.default: stack,
    aten.split_with_sizes.default: split_with_sizes,
    aten.split.sizes: split_with_sizes,
    aten.split.Tensor: split,
    aten.chunk.default: split,
    aten.unbind.int: unbind,
    aten.arange.default: arange,
    aten.arange.start: arange,
    aten.arange.start_step: arange,
    aten.full.default: full,
    aten.new_full.default: new_full,
    aten.zeros.default: _constructor(0),
    aten.ones.default: _constructor(1),
    aten.new_zeros.default: _new(0),
    aten.new_ones.default: _new(1),
    aten.zeros_like.default: _like(0),
    aten.ones_like.default: _like(1),
    aten.full_like.default: _like(None),
}
