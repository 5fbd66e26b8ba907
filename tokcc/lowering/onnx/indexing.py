"""Selecting, slicing, gathering, scattering, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tokcc.errors import LoweringError
from tokcc.ir.builder import same_size
from tokcc.lowering.onnx.translate import Translator, ir_dtype

__all__ = ["LOWERINGS", "main_diagonal"]

aten = torch.ops.aten
_END = 2**62


def _rank(x: Any) -> int:
    return int(x.meta["val"].ndim)


def select(t: Translator, node: fx.Node, x: Any, dim: int, index: Any) -> Any:
    """One position of an axis."""
    del node
    return t.op("Gather", t.value(x), t.value(index, torch.int64), axis=dim % _rank(x))


def slice_(
    t: Translator, node: fx.Node, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    """A range of an axis."""
    del node
    first: Any = 0 if start is None else start
    last: Any = 2**63 - 1 if end is None else end
    if isinstance(last, int) and last > _END:
        last = 2**63 - 1
    if isinstance(first, int) and first == 0 and last == 2**63 - 1 and step == 1:
        return t.value(x)
    return t.op(
        "Slice", t.value(x), t.size_vector(first), t.size_vector(last), t.op.ints([dim % _rank(x)]), t.op.ints([step])
    )


def narrow(t: Translator, node: fx.Node, x: Any, dim: int, start: Any, length: Any) -> Any:
    """So many positions of an axis."""
    del node
    first = t.size_vector(start)
    last = t.size_vector(length) if start == 0 else t.op("Add", first, t.size_vector(length))
    return t.op("Slice", t.value(x), first, last, t.op.ints([dim % _rank(x)]))


def index_copy(t: Translator, node: fx.Node, x: Any, dim: int, index: Any, source: Any) -> Any:
    """Positions of an axis replaced. ScatterND writes rows, and in place where a runtime may."""
    del node
    axis = dim % _rank(x)
    place = t.op("Reshape", t.value(index), t.op.ints([*([1] * axis), -1, 1]))
    sizes = [t.axis(source, i) for i in range(axis + 1)]
    shape = t.op("Concat", *sizes, t.op.ints([1]), axis=0)
    parts = []
    for i, size in enumerate(sizes[:-1]):
        stop = t.op("Squeeze", size, t.op.ints([0]))
        zero, one = (t.op.constant(n, ir_dtype(torch.int64)) for n in (0, 1))
        number = t.op(
            "Reshape", t.op("Range", zero, stop, one), t.op.ints([-1 if j == i else 1 for j in range(axis + 2)])
        )
        parts.append(t.op("Expand", number, shape))
    return t.op("ScatterND", t.value(x), t.op("Concat", *parts, t.op("Expand", place, shape), axis=-1), t.value(source))


def slice_scatter(
    t: Translator, node: fx.Node, x: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    """A tensor with a range of an axis replaced."""
    size = node.meta["val"].shape[dim % _rank(x)]
    known = isinstance(size, int) and all(part is None or isinstance(part, int) for part in (start, end))
    if step != 1 or not known:
        raise LoweringError("a range with steps, or of symbolic size, is replaced", node=node.name)
    first, last, _ = slice(start, end).indices(size)
    parts = [t.value(source)]
    if first:
        parts.insert(0, _range(t, x, dim, 0, first))
    if last < size:
        parts.append(_range(t, x, dim, last, size))
    return t.op("Concat", *parts, axis=dim % _rank(x)) if len(parts) > 1 else parts[0]


def copy(t: Translator, node: fx.Node, x: Any, source: Any, *rest: Any) -> Any:
    """What was written over the whole of ``x``."""
    del rest
    made = t.value(source)
    wanted, given = node.meta["val"], source.meta["val"]
    if wanted.dtype != given.dtype:
        made = t.op("Cast", made, to=int(ir_dtype(wanted.dtype)))
    return made if tuple(wanted.shape) == tuple(given.shape) else t.op("Expand", made, t.op("Shape", t.value(x)))


def _range(t: Translator, x: Any, dim: int, first: int, last: int) -> Any:
    return t.op("Slice", t.value(x), t.op.ints([first]), t.op.ints([last]), t.op.ints([dim % _rank(x)]))


def embedding(t: Translator, node: fx.Node, table: Any, index: Any, *rest: Any) -> Any:
    """Rows of a table."""
    del node, rest
    return t.op("Gather", t.value(table), t.value(index), axis=0)


def index_select(t: Translator, node: fx.Node, x: Any, dim: int, index: Any) -> Any:
    """Positions of an axis."""
    del node
    return t.op("Gather", t.value(x), t.value(index), axis=dim % _rank(x) if _rank(x) else 0)


def gather(t: Translator, node: fx.Node, x: Any, dim: int, index: Any, **kwargs: Any) -> Any:
    """``torch.gather``; used on small index tensors."""
    del node, kwargs
    return t.op("GatherElements", t.value(x), t.value(index), axis=dim % _rank(x))


def scatter_src(t: Translator, node: fx.Node, x: Any, dim: int, index: Any, source: Any) -> Any:
    """``scatter`` without reduction."""
    dtype = node.meta["val"].dtype
    return t.op("ScatterElements", t.value(x, dtype), t.value(index), t.value(source, dtype), axis=dim % _rank(x))


def scatter_value(t: Translator, node: fx.Node, x: Any, dim: int, index: Any, value: Any) -> Any:
    """``scatter`` of one number."""
    dtype = node.meta["val"].dtype
    places = t.value(index)
    source = t.op("Expand", t.value(value, dtype), t.op("Shape", places))
    return t.op("ScatterElements", t.value(x, dtype), places, source, axis=dim % _rank(x))


def index_tensor(t: Translator, node: fx.Node, x: Any, indices: Sequence[Any]) -> Any:
    """Advanced indexing by one tensor, or by broadcast tensors on the leading axes."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) == 1:
        axis, index = given[0]
        if index.meta["val"].dtype == torch.bool:
            raise LoweringError("boolean indexing gives a size that depends on the data", node=node.name)
        return t.op("Gather", t.value(x), t.value(index), axis=axis)
    if [axis for axis, _ in given] != list(range(len(given))):
        raise LoweringError("advanced indexing on axes that are not the leading ones", node=node.name)
    values = [t.value(index, torch.int64) for _, index in given]
    widest = values[0]
    for value in values[1:]:
        widest = t.op("Add", widest, t.op("Mul", value, t.op.constant(0, ir_dtype(torch.int64))))
    shape = t.op("Shape", widest)
    rank = max(index.meta["val"].ndim for _, index in given)
    expanded = [t.op("Unsqueeze", t.op("Expand", v, shape), t.op.ints([rank])) for v in values]
    return t.op("GatherND", t.value(x), t.op("Concat", *expanded, axis=rank))


def pad(t: Translator, node: fx.Node, x: Any, widths: Sequence[int], mode: str = "constant", value: Any = None) -> Any:
    """Padding of the last axes."""
    rank = _rank(x)
    before, behind = [0] * rank, [0] * rank
    for i in range(len(widths) // 2):
        before[rank - 1 - i], behind[rank - 1 - i] = widths[2 * i], widths[2 * i + 1]
    kinds = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    fill = t.value(float(value or 0.0), node.meta["val"].dtype) if mode == "constant" else None
    return t.op("Pad", t.value(x), t.op.ints([*before, *behind]), fill, mode=kinds[mode])


def constant_pad(t: Translator, node: fx.Node, x: Any, widths: Sequence[int], value: Any = 0) -> Any:
    """Padding with a constant."""
    return pad(t, node, x, widths, "constant", value)


def flip(t: Translator, node: fx.Node, x: Any, dims: Sequence[int]) -> Any:
    """Reverse axes."""
    del node
    axes = [d % _rank(x) for d in dims]
    count = len(axes)
    last, beyond_first = t.op.ints([-1] * count), t.op.ints([-_END] * count)
    return t.op("Slice", t.value(x), last, beyond_first, t.op.ints(axes), t.op.ints([-1] * count))


def roll(t: Translator, node: fx.Node, x: Any, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    """Cyclic shift."""
    if not dims:
        raise LoweringError("a roll over the flattened tensor", node=node.name, help="give its axes")
    value = t.value(x)
    for shift, dim in zip(shifts, dims, strict=True):
        axis = dim % _rank(x)
        length = x.meta["val"].shape[axis]
        if shift == 0:
            continue
        if isinstance(length, int):
            start = t.op.ints([-shift % length])
        else:
            start = t.op("Mod", t.op.ints([-shift]), t.op("Shape", value, start=axis, end=axis + 1))
        head = t.op("Slice", value, start, t.op.ints([2**63 - 1]), t.op.ints([axis]), t.op.ints([1]))
        tail = t.op("Slice", value, t.op.ints([0]), start, t.op.ints([axis]), t.op.ints([1]))
        value = t.op("Concat", head, tail, axis=axis)
    return value


def diagonal(t: Translator, node: fx.Node, x: Any, offset: int = 0, first: int = 0, second: int = 1) -> Any:
    """Main diagonal of the last two axes."""
    rank, shape = _rank(x), x.meta["val"].shape
    if offset != 0 or (first % rank, second % rank) != (rank - 2, rank - 1):
        raise LoweringError("a diagonal other than the main one of the last axes", node=node.name)
    return main_diagonal(t, node, t.value(x), shape, x.meta["val"].dtype)


def main_diagonal(t: Translator, node: fx.Node, value: Any, shape: Sequence[Any], dtype: torch.dtype) -> Any:
    """Mark the diagonal of square matrices and sum, which needs no gather.

    Args:
        t: Translates.
        node: What is translated, for errors.
        value: The matrices.
        shape: Their sizes.
        dtype: Their type.
    """
    rank, length = len(shape), shape[-1]
    if not same_size(length, shape[-2]):
        raise LoweringError("a diagonal of matrices that are not square", node=node.name)
    size = t.op("Shape", value, start=rank - 1, end=rank)
    stop = t.op.constant(length, ir_dtype(torch.int64)) if isinstance(length, int) else t.op("Squeeze", size)
    zero, one = (t.op.constant(v, ir_dtype(torch.int64)) for v in (0, 1))
    position = t.op("Range", zero, stop, one)
    mark = t.op("Equal", t.op("Unsqueeze", position, t.op.ints([1])), t.op("Unsqueeze", position, t.op.ints([0])))
    return t.op("ReduceSum", t.op("Where", mark, value, t.value(0.0, dtype)), t.op.ints([rank - 1]), keepdims=0)


LOWERINGS: dict[Any, Any] = {
    aten.select.int: select,
    aten.slice.Tensor: slice_,
    aten.narrow.default: narrow,
    aten.index_copy.default: index_copy,
    aten.slice_scatter.default: slice_scatter,
    aten.copy.default: copy,
    aten.embedding.default: embedding,
    aten.index_select.default: index_select,
    aten.gather.default: gather,
    aten.scatter.src: scatter_src,
    aten.scatter.value: scatter_value,
    aten.index.Tensor: index_tensor,
    aten.pad.default: pad,
    aten.constant_pad_nd.default: constant_pad,
    aten.flip.default: flip,
    aten.roll.default: roll,
    aten.diagonal.default: diagonal,
}
