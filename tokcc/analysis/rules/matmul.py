"""Matrix products and convolutions."""

from __future__ import annotations

from typing import Any

import torch

from tokcc.analysis.context import Context, Group
from tokcc.ir.space import Axis, Factor
from tokcc.ir.value import Value

__all__ = ["RULES"]

aten = torch.ops.aten


def _has_tokens(axis: Axis) -> bool:
    return any(f.space is not None and not f.space.is_batch and f.space.reduced for f in axis)


def linear(ctx: Context, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """A layer over the last axis, which must not be the token axis."""
    if _has_tokens(x.axes[-1]):
        ctx.fail("a linear layer mixes the token axis: its weights are tied to every token")
    old = ctx.old_shape()
    handle = ctx.emit(x.handle, weight.handle, None if bias is None else bias.handle)
    out: Axis = () if isinstance(old[-1], int) and old[-1] == 1 else (Factor(None, old[-1]),)
    return x.having(handle=handle, axes=(*x.axes[:-1], out), old=old)


def addmm(ctx: Context, bias: Value, x: Value, weight: Value, **kwargs: Any) -> Value:
    """``bias + x @ weight``."""
    if _has_tokens(x.axes[-1]) or _has_tokens(weight.axes[0]):
        ctx.fail("a matrix product mixes the token axis")
    handle = ctx.emit(bias.handle, x.handle, weight.handle, **kwargs)
    return x.having(handle=handle, axes=(x.axes[0], weight.axes[1]), old=ctx.old_shape())


def matmul(ctx: Context, first: Value, second: Value) -> Value:
    """Batched product: leading axes broadcast, the contracted axes agree."""
    if first.rank < 2 or second.rank < 2:
        return _with_vector(ctx, first, second)
    old = ctx.old_shape()
    if not ctx.clean:
        rank = max(first.rank, second.rank)
        first = ctx.pad_rank(first, rank) if first.side else first
        second = ctx.pad_rank(second, rank) if second.side else second
    lead = max(first.rank, second.rank) - 2
    groups: list[Group] = []
    for p in range(-lead - 2, -2):
        groups.append([(i, v.rank + p) for i, v in enumerate((first, second)) if v.rank + p >= 0])
    groups.append([(0, first.rank - 1), (1, second.rank - 2)])
    groups.append([(0, first.rank - 2)])
    groups.append([(1, second.rank - 1)])
    (left, right), joints = ctx.align([first, second], groups)
    _check_contraction(ctx, left.axes[-1], right.axes[-2])
    handle = ctx.emit(left.handle, right.handle)
    return Value(handle, (*joints[:lead], left.axes[-2], right.axes[-1]), old, side=left.side and right.side)


def _check_contraction(ctx: Context, first: Axis, second: Axis) -> None:
    """A product over tokens is only meaningful when one side is a distribution over the tokens that are left."""
    if not _has_tokens(first) and not _has_tokens(second):
        return
    if any(f.normalised for f in (*first, *second)):
        return
    ctx.fail("a product sums over the token axis without attention weights, and dropped tokens are missing from it")


def _with_vector(ctx: Context, first: Value, second: Value) -> Value:
    axis = first.axes[-1]
    other = second.axes[0] if second.rank == 1 else second.axes[-2]
    if _has_tokens(axis) or _has_tokens(other):
        ctx.fail("a product sums over the token axis without attention weights")
    axes = first.axes[:-1] if second.rank == 1 else (*second.axes[:-2], second.axes[-1])
    return Value(ctx.emit(first.handle, second.handle), tuple(axes), ctx.old_shape())


def baddbmm(ctx: Context, bias: Value, first: Value, second: Value, **kwargs: Any) -> Value:
    """``bias + first @ second``, as older attention code writes it."""
    if ctx.clean:
        product = matmul(ctx, first, second)
        return product
    node = ctx.node
    assert node is not None
    b = ctx.builder
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        ctx.fail("baddbmm with factors over a reduced token axis")
    groups: list[Group] = [[(0, 0), (1, 0)], [(0, 2), (1, 1)], [(0, 1)], [(1, 2)]]
    (left, right), joints = ctx.align([first, second], groups)
    _check_contraction(ctx, left.axes[-1], right.axes[-2])
    product = Value(b.matmul(left.handle, right.handle), (joints[0], left.axes[1], right.axes[2]), ctx.old_shape())
    (x, y), axes, old = ctx.broadcast([product, bias])
    return Value(b.add(x.handle, y.handle), axes, old)


def conv(ctx: Context, x: Value, weight: Value, bias: Value | None = None, *rest: Any, **kwargs: Any) -> Value:
    """A convolution; over tokens it would need the dropped ones."""
    if any(_has_tokens(axis) for axis in x.axes[1:]):
        ctx.fail("a convolution runs over the token axis: every token must be in its place")
    handle = ctx.emit(x.handle, weight.handle, None if bias is None else bias.handle, *rest, **kwargs)
    old = ctx.old_shape()
    axes = (x.axes[0], *((Factor(None, size),) for size in old[1:]))
    return x.having(handle=handle, axes=axes, old=old)


def einsum(ctx: Context, equation: str, operands: list[Value], **kwargs: Any) -> Value:
    """A product written with letters: axes of one letter agree, letters that are not in the result are summed over."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    plain = all(len(set(own)) == len(own) == v.rank for own, v in zip(labels, operands, strict=True))
    if not arrow or "." in equation or not plain:
        ctx.fail("no axis rule for an einsum with repeated letters, dots or without `->`")
    if not ctx.clean:
        operands, labels = _with_samples(ctx, operands, labels)
        equation = f"{','.join(labels)}->{output}"
    letters = list(dict.fromkeys("".join(labels)))
    groups: list[Group] = [
        [(i, own.index(letter)) for i, own in enumerate(labels) if letter in own] for letter in letters
    ]
    aligned, joints = ctx.align(operands, groups)
    found = dict(zip(letters, joints, strict=True))
    for letter in letters:
        if letter not in output and _has_tokens(found[letter]):
            ends = [v.axes[own.index(letter)] for own, v in zip(labels, aligned, strict=True) if letter in own]
            if not any(f.normalised for axis in ends for f in axis):
                ctx.fail("a product sums over the token axis without attention weights")
    handle = ctx.emit(equation, [v.handle for v in aligned], **kwargs)
    axes = tuple(found[letter] for letter in output)
    return Value(handle, axes, ctx.old_shape(), side=all(v.side for v in operands))


def _with_samples(ctx: Context, operands: list[Value], labels: list[str]) -> tuple[list[Value], list[str]]:
    """Give tables that tokens chosen per sample will be taken from an axis for the samples."""
    found = [
        (letter, axis)
        for v, own in zip(operands, labels, strict=True)
        for letter, axis in zip(own, v.axes, strict=True)
    ]
    samples = next((k for k, axis in found if any(f.space is not None and f.space.is_batch for f in axis)), None)
    tokens = {letter for letter, axis in found if _has_tokens(axis)}
    if samples is None:
        return operands, labels
    result = list(operands)
    for i, (value, own) in enumerate(zip(operands, labels, strict=True)):
        if samples not in own and not value.spaces and tokens & set(own):
            result[i], labels = ctx.pad_rank(value, value.rank + 1), [*labels[:i], samples + own, *labels[i + 1 :]]
    return result, labels


RULES: dict[Any, Any] = {
    aten.einsum.default: einsum,
    aten.linear.default: linear,
    aten.addmm.default: addmm,
    aten.mm.default: matmul,
    aten.matmul.default: matmul,
    aten.bmm.default: matmul,
    aten.baddbmm.default: baddbmm,
    aten.conv2d.default: conv,
    aten.conv3d.default: conv,
    aten.conv1d.padding: conv,
    aten.conv2d.padding: conv,
    aten.convolution.default: conv,
}
